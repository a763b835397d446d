"""A root segment that starts with given weights: its id is their content, and what does not fit is said at plan time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.study.test_plan import TEXTS, of_kind, planned
from zexp import starter
from zexp.blocks.resolve import resolve_model
from zexp.config.errors import ConfigError
from zexp.model.build import build
from zexp.model.hf import convert, export, folder, table
from zexp.store.errors import StoreError

TINY = {
    "pattern": "a d",
    "width": 16,
    "blocks": {"a": {"heads": 2}, "d": {"width": 24}},
}
ARCH = (
    "arch.pattern=a d",
    "arch.width=16",
    "arch.blocks={a:{heads:2,rope_theta:10000.0},d:{width:24,activation:swiglu}}",
)


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / "a.txt").write_text(TEXTS)
    (tmp_path / "b.txt").write_text(TEXTS.replace("says", "holds"))
    semantic = resolve_model(TINY, 300)
    weights = dict(build(semantic, seed=5).state_dict())
    export.write_hf(tmp_path / "in", table.family_of(semantic), semantic, weights, positions=64, eod_id=0, tokenizer={})
    return tmp_path


def roots(plan) -> list:
    return [plan.stages[id] for id in of_kind(plan, "segment") if plan.stages[id].semantic["parent"] is None]


def test_its_id_is_the_weights_content_and_no_seeds(directory):
    (drawn,) = roots(planned(directory, ARCH))
    (given,) = roots(planned(directory, (*ARCH, "init.from_hf=in")))
    assert "seeds" in drawn.semantic and "init" not in drawn.semantic and "from_hf" not in drawn.request
    assert "seeds" not in given.semantic and given.semantic["init"]["from_hf"]["model_type"] == "llama"
    assert given.semantic["numerics"]["init.hf"] == 1
    assert given.request["from_hf"] == str(directory / "in")
    shutil.copytree(directory / "in", directory / "elsewhere")
    (moved,) = roots(planned(directory, (*ARCH, f"init.from_hf={directory / 'elsewhere'}")))
    assert moved.full_id == given.full_id
    file = directory / "in" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    (other,) = roots(planned(directory, (*ARCH, "init.from_hf=in")))
    assert other.full_id != given.full_id


def test_only_the_root_is_told_where_the_weights_lie(directory):
    plan = planned(directory, (*ARCH, "init.from_hf=in"))
    told = [stage.id for stage in plan.stages.values() if "from_hf" in stage.request]
    assert told == [stage.id for stage in roots(plan)]


def test_a_seed_orders_the_data_alone(directory):
    words = (*ARCH, "init.from_hf=in")
    plan = planned(directory, words, (*words, "seed=1"))
    assert len(roots(plan)) == 2
    assert len({json.dumps(stage.semantic["init"]) for stage in roots(plan)}) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("init.from_hf=nowhere",), ["init.from_hf = ", "nowhere: no such folder"]),
        (("init.from_hf=in", "seeds.init=3"), ["seeds.init = 3 draws no weights"]),
        (
            ("init.from_hf=in", "arch.blocks.a.heads=4", "arch.blocks.d.width=32"),
            [
                "arch.blocks.a.heads = 4",
                "num_attention_heads: 2. Set arch.blocks.a.heads=2.",
                "arch.blocks.d.width = 32",
            ],
        ),
        (("init.from_hf=in", "arch.pattern=a d a d"), ["has 2 layers, a d; the pattern has 4"]),
        (
            ("init.from_hf=in", "+arch.match={parameters:20K}"),
            ["arch.match and init.from_hf are both set", "Set arch.match to null"],
        ),
        (("init.from_hf=in", "+arch.vocab_size=320"), ["arch.vocab_size = 320", "vocab_size: 300"]),
    ],
    ids=["folder", "seed", "keys", "pattern", "match", "vocabulary"],
)
def test_what_does_not_fit_is_said_before_anything_starts(directory, words, says):
    with pytest.raises(ConfigError) as caught:
        planned(directory, (*ARCH, *words))
    assert [text for text in says if text not in str(caught.value)] == [], str(caught.value)


def test_missing_and_surplus_tensors_are_named(directory):
    file = directory / "in" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors | {"model.extra": torch.zeros(1)}, file)
    with pytest.raises(ConfigError) as caught:
        planned(directory, (*ARCH, "init.from_hf=in"))
    assert "lacks model.norm.weight." in str(caught.value) and "model.extra." in str(caught.value)


def test_nan_weights_are_named_where_they_are_read(directory):
    file = directory / "in" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = torch.nan
    tensors["model.layers.0.mlp.up_proj.weight"][:2, 0] = torch.inf
    save_file(tensors, file)
    semantic = resolve_model(TINY, 300)
    read = folder.read(directory / "in", "init.from_hf")
    with pytest.raises(StoreError) as caught:
        convert.load(read, folder.check(read, semantic, "init.from_hf"), build(semantic, seed=None), semantic)
    assert "model.norm.weight (1 of 16), model.layers.0.mlp.up_proj.weight (2 of 384). " in str(caught.value)
    assert "save or download the checkpoint again" in str(caught.value)


def test_a_folder_of_ones_own_needs_a_row_for_every_token(directory):
    words = {f"word{number}": number for number in range(305)}
    (directory / "in/tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    (directory / "in/tokenizer_config.json").write_text(json.dumps({"eos_token": "word0"}))
    with pytest.raises(ConfigError, match=r"has 300 rows, and its tokenizer\.json has token ids up to 304: 5 tokens"):
        starter.write(directory / "mine", directory / "in")
    assert not (directory / "mine").exists()
    del words["word304"], words["word303"], words["word302"], words["word301"], words["word300"]
    (directory / "in/tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    assert directory / "mine/conf/arch/mine.yaml" in starter.write(directory / "mine", directory / "in")


def test_other_mistakes_are_reported_with_it(directory):
    with pytest.raises(ConfigError) as caught:
        planned(directory, (*ARCH, "init.from_hf=nowhere", "eval.tasks=[bpb_bass]"))
    assert "no such folder" in str(caught.value) and "bpb_bass" in str(caught.value)


def test_the_check_imports_no_torch(directory):
    code = (
        "import sys; from pathlib import Path; from zexp.model.hf import folder; "
        f"found = folder.read(Path({str(directory / 'in')!r}), 'init.from_hf'); "
        "from zexp.model.hf.table import family_for; family = family_for(found.config, 'config.json'); "
        "folder.check(found, family.resolved(found.config), 'init.from_hf'); "
        "print([name for name in ('torch', 'transformers', 'tokenizers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
