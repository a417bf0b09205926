"""The model card: README.md beside saved weights. Its head is what the hub reads."""

import inspect
import json
import math
import platform
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData

USAGE = """## How to use it

```python
from transformers import {auto}

model = {auto}.from_pretrained("FOLDER"{trust})
```

{forward}
"""
CARD = """---
{head}
---

# {name}, after {step} updates

{usage}
## Metrics

{metrics}

## How it was trained

```yaml
{config}```

Python {python}, {versions}
"""


def write_card(folder: Path, model, state):
    """Write README.md for the model that was saved to `folder`, of update `state.step`.

    Metrics are those of this update, if it was evaluated. What loads the model follows from the
    config.json that is saved with it.
    """
    path = folder / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config = state.training_config
    name = (saved.get("architectures") or [type(model).__name__])[0]
    own = next(iter(saved.get("auto_map", {}).keys() - {"AutoConfig"}), None)  # its code lies here
    usage = USAGE.format(
        auto=own or name,
        trust=", trust_remote_code=True" if own else "",
        forward=f"```\n{inspect.getdoc(type(model).forward)}\n```" if own else "",
    )
    metrics = {
        metric: value
        for metric, value in state.evaluations.get(state.step, {}).items()
        if math.isfinite(value)
    }
    dataset = {"task_type": "other", "dataset_type": "csv", "dataset_name": config["data_dir"]}
    base = config.get("model_name_or_path")
    head = ModelCardData(
        library_name="transformers",
        model_name=name,
        base_model=base if base and not Path(base).exists() else None,  # a name on the hub
        eval_results=[
            EvalResult(**dataset, metric_type=metric, metric_value=value)
            for metric, value in metrics.items()
        ],
    )
    card = CARD.format(
        head=head.to_yaml(),
        name=name,
        step=state.step,
        usage=usage if saved else "",
        metrics="\n".join(f"    {metric:<24}{value:.4f}" for metric, value in metrics.items()),
        config=yaml.safe_dump(config, sort_keys=False),
        python=platform.python_version(),
        versions=", ".join(f"{package} {version}" for package, version in state.versions.items()),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
