import pandas as pd
import torch
from transformers import BertConfig, BertForSequenceClassification, ByT5Tokenizer

OPTIONS = ["--max_length", "10", "--max_grad_norm", "2"]


def make_data(folder):
    (folder / "csv").mkdir(parents=True)
    for split, count in (("train", 45), ("eval", 14)):
        texts = [("abc한ab한cc" * 3)[row * row % 9 :][: row % 14] for row in range(count)]
        table = pd.DataFrame({"text": texts})
        table["label"] = ["positive" if text.count("a") > 1 else "negative" for text in texts]
        table.to_csv(folder / "csv" / f"{split}.csv", index=False)


def make_model(folder, dropout):
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    options = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    options |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = BertConfig(intermediate_size=32, vocab_size=259, initializer_range=0.3, **options)
    BertForSequenceClassification(config).save_pretrained(folder)
