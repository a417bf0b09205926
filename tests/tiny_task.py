"""The task that tests/loop/ proves the loop on. For another task this is the one file to edit."""

from page_data import make_tiny_model, write_data

# Flags of train.py that this task needs. The norm of the gradient must be above --max_grad_norm
# in some updates and below it in others: a test says so.
OPTIONS = ["--num_negatives", "3", "--max_grad_norm", "20"]


def make_data(folder):
    """Write what --data_dir names. 12 must not divide the number of training items."""
    write_data(folder)


def make_model(folder, dropout):
    """Save what --model_name_or_path names. It must not say the same of every item."""
    make_tiny_model(folder, dropout)
