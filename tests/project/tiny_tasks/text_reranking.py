import torch
from transformers import BertConfig, BertForSequenceClassification, ByT5Tokenizer

OPTIONS = ["--num_negatives", "3", "--max_length", "8", "--max_grad_norm", "0.9"]


def make_data(folder):
    (folder / "csv").mkdir(parents=True)
    texts = [f"글{i},{'abc한'[i % 4]}{'abcd'[: i % 5]}\n" for i in range(28)]
    (folder / "texts.csv").write_text("resourceKey,text\n" + "".join(texts), encoding="utf-8")
    for split, count in (("train", 47), ("eval", 13), ("test_vocabulary", 19)):
        lines = "query,resourceKey,candidate_resourceKey\n"
        for i in range(count):
            keys = [f"글{(4 * i * i + i + j) % 28}" for j in (1, 0, 2, 3, 5, 6, 7, 9)]
            lines += f'{"abc한"[i % 4]},{keys[1]},"{keys[: i % 9]}"\n'
        (folder / "csv" / f"{split}.csv").write_text(lines, encoding="utf-8")


def make_model(folder, dropout):
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    options = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    options |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options |= {"intermediate_size": 32, "vocab_size": 259, "initializer_range": 0.3}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(num_labels=2, **options)).save_pretrained(folder)
