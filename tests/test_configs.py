"""Every recipe is accepted by the command that runs it.

A YAML file directly in a package's folder is a recipe, or, when it names no class of model, an overlay for those
recipes of its package whose model has the settings that it changes (`-c mlip/yfcc15m.yaml -c mlip/smoke.yaml`).
"""

from importlib import import_module
from inspect import Parameter, signature

import pytest
import yaml

from common.cli import main
from tests.readme import ROOT

FILES = sorted(
    path for package in ("common", "waveclip", "mlip", "patchrank") for path in (ROOT / package).glob("*.yaml")
)
CONTENTS = {path: yaml.safe_load(path.read_text()) for path in FILES}
RECIPES = [path for path in FILES if "class_path" in CONTENTS[path].get("model", {})]
OVERLAYS = [path for path in FILES if path not in RECIPES]


def settings(kind):
    """The arguments of a class, and those of its base class that it passes on."""
    found = signature(kind.__init__).parameters
    passed = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in found.values())
    return found.keys() | (settings(kind.__base__) if passed else set())


def fits(overlay, recipe):
    """Whether an overlay is for this recipe."""
    changed = CONTENTS[overlay].get("model", {}).get("init_args", {})
    package, _, name = CONTENTS[recipe]["model"]["class_path"].rpartition(".")
    return recipe.parent == overlay.parent and changed.keys() <= settings(getattr(import_module(package), name))


RUNS = [[recipe] for recipe in RECIPES] + [
    [recipe, overlay] for overlay in OVERLAYS for recipe in RECIPES if fits(overlay, recipe)
]


@pytest.mark.parametrize("files", RUNS, ids=lambda files: "+".join(str(path.relative_to(ROOT)) for path in files))
def test_recipe_is_parsed_with_all_its_settings(files, capsys):
    arguments = [argument for path in files for argument in ("-c", str(path))]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code in (0, None), printed.err
    merged = yaml.safe_load(printed.out)
    assert merged["model"]["class_path"]
    assert merged["trainer"]


def test_every_overlay_has_a_recipe_to_change():
    assert {overlay for _, *overlays in RUNS for overlay in overlays} == set(OVERLAYS)
