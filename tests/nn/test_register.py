"""`import unfused` stays light, and the Auto classes know our models whatever was imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from unfused.nn.register import ALIAS, TABLES, install_hook, register

CHECK = """
from transformers import AutoConfig, AutoModel, AutoModelForAudioClassification
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
config = AutoConfig.for_model("unfused-audio", width=2, dim=4)
assert type(config).__module__ == "unfused.nn.audio_model", type(config)
assert type(AutoModel.from_config(config)).__name__ == "UnfusedAudioModel"
assert type(AutoModelForAudioClassification.from_config(config)).__name__ == "UnfusedAudioForClassification"
assert FEATURE_EXTRACTOR_MAPPING[type(config)].__name__ == "UnfusedFeatureExtractor"
"""
LIGHT = """
import sys
import unfused
heavy = {"torch", "transformers", "sklearn", "scipy"} & set(sys.modules)
assert not heavy, heavy
from transformers.models.auto import configuration_auto
assert "unfused-audio" in configuration_auto.CONFIG_MAPPING
assert "unfused.nn.audio_model" not in sys.modules  # until it is needed
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "code",
    [
        LIGHT + CHECK,
        # transformers' own modules are half imported when these reach the Auto classes
        "import unfused\nfrom transformers import PreTrainedModel\nimport unfused.nn.audio_model\n" + CHECK,
        "from transformers import AutoModel, AutoFeatureExtractor\nimport unfused\n" + CHECK,
    ],
    ids=["unfused first", "half imported", "transformers first"],
)
def test_auto_classes_know_us(code):
    run(code)


def test_repeating_changes_nothing():
    for _ in range(2):
        install_hook()
        register()
    assert sum(type(finder).__module__ == "unfused.nn.register" for finder in sys.meta_path) == 1
    assert set(TABLES) <= set(sys.modules)
    exec(CHECK)


def test_the_alias_is_not_a_second_copy():
    register()
    exec(CHECK)
    from unfused.nn import audio_model

    assert sys.modules[ALIAS].UnfusedAudioConfig is audio_model.UnfusedAudioConfig
    assert audio_model.__spec__.name == "unfused.nn.audio_model"


def test_the_mappings_can_still_be_listed():
    register()
    from transformers.models.auto import modeling_auto

    classes = modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING.values()
    assert "UnfusedAudioForClassification" in [c.__name__ for c in classes]
