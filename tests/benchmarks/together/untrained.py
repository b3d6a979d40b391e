"""Untrained models in the place of trained ones, for benchmarks that train."""

import json

import torch
from lightning.pytorch import Trainer

from benchmarks import read_recipe
from benchmarks.training.export import training_class

CONDITIONS = {"clean": True, "seed": 0, "revision": "abc", "date": "2026", "device": "CPU", "threads": 2, "torch": "2"}


def untrained(run, folder, overlay=None, places=None, apart=True):
    """What ``benchmarks.training.run.fit`` leaves in the folder and returns, without a training."""
    recipe = read_recipe(run.recipe)
    settings = recipe["model"]["init_args"] | run.settings.get("model", {}) | places["model"]
    if "weights" not in places["model"]:
        settings.pop("weights", None)
    torch.manual_seed(run.seed)
    module = training_class(recipe)(**settings)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "last.ckpt")
    (folder / "places.json").write_text(json.dumps(places))
    result = {"name": run.name, "command": f"lightning fit -c {run.recipe}", "conditions": CONDITIONS}
    return result | {"minutes": 6.7, "legs": 1, "steps": 4 if overlay else run.steps}
