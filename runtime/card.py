"""The model card: README.md beside saved weights. Its head is what the hub reads."""

import inspect
import math
import platform
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

CARD = """---
{head}
---

# {name}, after {step} updates

## How to use it

```python
from transformers import {auto}

model = {auto}.from_pretrained("FOLDER"{trust})
```

{forward}

## Metrics

{metrics}

## How it was trained

```yaml
{config}```

Python {python}, {versions}
"""


def make_card(model: PreTrainedModel, state) -> str:
    """The text of README.md, for the model after update `state.step`.

    Metrics are those of this update, if it was evaluated.
    """
    name, config = type(model).__name__, state.training_config
    metrics = {
        metric: value
        for metric, value in state.evaluations.get(state.step, {}).items()
        if math.isfinite(value)
    }
    dataset = {"task_type": "other", "dataset_type": "csv", "dataset_name": config["data_dir"]}
    base = config["model_name_or_path"]
    head = ModelCardData(
        library_name="transformers",
        model_name=name,
        base_model=base if base and not Path(base).exists() else None,  # a name on the hub
        eval_results=[
            EvalResult(**dataset, metric_type=metric, metric_value=value)
            for metric, value in metrics.items()
        ],
    )
    own = type(model)._auto_class  # a class that transformers does not have: its code lies here too
    return CARD.format(
        head=head.to_yaml(),
        name=name,
        step=state.step,
        auto=own or name,
        trust=", trust_remote_code=True" if own else "",
        forward=f"```\n{inspect.getdoc(type(model).forward)}\n```" if own else "",
        metrics="\n".join(f"    {metric:<24}{value:.4f}" for metric, value in metrics.items()),
        config=yaml.safe_dump(config, sort_keys=False),
        python=platform.python_version(),
        versions=", ".join(f"{package} {version}" for package, version in state.versions.items()),
    )
