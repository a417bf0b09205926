import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

OPTIONS = ["--max_length", "12", "--max_grad_norm", "5"]


def make_data(folder):
    (folder / "csv").mkdir(parents=True)
    for split, count in (("train", 44), ("eval", 13), ("generate", 17)):
        texts = [("abcd한" * 5)[i * i % 5 :] for i in range(count)]
        lines = [f"{t[: 1 + i % 15]},{t[1 + i % 15 :][: 1 + i % 3]}\n" for i, t in enumerate(texts)]
        lines = "text,continuation\n" + "".join(lines)
        (folder / "csv" / f"{split}.csv").write_text(lines, encoding="utf-8")


def make_model(folder, dropout):
    letters = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("?abcd한")}, "?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="?").save_pretrained(folder)
    options = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    options |= {"n_embd": 24, "n_layer": 1, "vocab_size": 6, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = GPT2Config(bos_token_id=None, eos_token_id=None, **options)
    GPT2LMHeadModel(config).save_pretrained(folder)
