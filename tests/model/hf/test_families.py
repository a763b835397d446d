"""Out and in: every family's class runs our weights, we run its weights, and nothing changes on the way, to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="parity needs the extra zexp[hf]")

from tests.model.hf.archs import OURS, THEIRS, VOCAB, WIDTH  # noqa: E402
from zexp.blocks.resolve import resolve_model  # noqa: E402
from zexp.calc import model as calc_model  # noqa: E402
from zexp.config.errors import ConfigError  # noqa: E402
from zexp.config.places import conf_dir  # noqa: E402
from zexp.model.build import build  # noqa: E402
from zexp.model.hf import convert, export, folder, table  # noqa: E402
from zexp.model.hf.family import Parts  # noqa: E402
from zexp.model.language_model import LanguageModel  # noqa: E402

LENGTH = 37  # a length that no chunk divides


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)


def spread_out(model: torch.nn.Module) -> None:
    """Norms, biases and the biases of a choice start at constants: one that goes lost would not show."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif (
                ((tensor.dim() > 1 and "A_log" not in name) or name.endswith("bias"))
                and "conv" not in name
                and "dt_" not in name
            ):
                tensor.normal_(0, 0.2)
        for name, tensor in model.named_buffers():
            if name.endswith(("choice_bias", "e_score_correction_bias")):
                tensor.normal_(0, 0.2)


def model_of(name: str) -> tuple[LanguageModel, dict[str, Any]]:
    _, arch = OURS[name]
    semantic = resolve_model({"width": WIDTH, **arch}, VOCAB)
    model = build(semantic, seed=0)
    spread_out(model)
    return model.eval(), semantic


def written(model: LanguageModel, semantic: dict[str, Any], target: Path, **more: Any) -> Path:
    family = table.family_of(semantic)
    export.write_hf(target, family, semantic, dict(model.state_dict()), positions=64, eod_id=0, tokenizer={}, **more)
    return target


def loaded(path: Path) -> Any:
    model, facts = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(facts.values()), facts
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours: LanguageModel, theirs: torch.nn.Module) -> None:
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).logits
    assert expected.std() > 0.1
    assert (ours.logits(ours(tokens)) - expected).abs().max() < 1e-4 * expected.abs().max()


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("name", OURS)
def test_transformers_runs_what_we_write(name, tmp_path):
    model, semantic = model_of(name)
    path = written(model, semantic, tmp_path / "out")
    theirs = loaded(path)
    assert type(theirs).__name__ == f"{OURS[name][0]}ForCausalLM"
    assert_same_logits(model, theirs)


@pytest.mark.parametrize("name", OURS)
def test_what_we_write_comes_back_the_same(name, tmp_path):
    model, semantic = model_of(name)
    read = folder.read(written(model, semantic, tmp_path / "out"), "init.from_hf")
    again = build(semantic, seed=None)
    convert.load(read, folder.check(read, semantic, "init.from_hf"), again, semantic)
    assert_same_bits(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("name", THEIRS)
def test_we_run_what_transformers_writes_and_write_it_back(name, tmp_path):
    kind, keys = THEIRS[name]
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **keys))
    spread_out(theirs)
    theirs.eval().save_pretrained(tmp_path / "in")
    read = folder.read(tmp_path / "in", "init.from_hf")
    family = table.family_for(read.config, read.where)
    semantic = family.resolved(read.config)
    assert folder.check(read, semantic, "init.from_hf") is family
    ours = build(semantic, seed=None).eval()
    convert.load(read, family, ours, semantic)
    assert_same_logits(ours, theirs)
    back = written(ours, semantic, tmp_path / "out")
    assert_same_bits(load_file(back / "model.safetensors"), load_file(tmp_path / "in/model.safetensors"))
    assert_same_logits(ours, loaded(back))


@pytest.mark.parametrize("name", OURS)
def test_the_pieces_are_all_tensors_of_the_model_once(name):
    _, semantic = model_of(name)
    pieces = list(table.family_of(semantic).tensors(Parts(semantic)))
    built = build(semantic, seed=None, device="meta").state_dict()
    assert sorted(piece.ours for piece in pieces) == sorted(built)
    names = [theirs.name for piece in pieces for theirs in piece.theirs]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["llama", "zamba2", "mamba2"])
def test_generation_with_a_cache_is_ours(name, tmp_path):
    """Their cache and ours; for Zamba2 the time step's lower bound, which only their full pass has, bounds nothing."""
    model, semantic = model_of(name)
    theirs = loaded(written(model, semantic, tmp_path / "out"))
    tokens = torch.randint(1, VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    made = theirs.generate(tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    for _ in range(6):
        with torch.no_grad():
            following = model.logits(model(tokens)[:, -1]).argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, following), dim=1)
    assert made.tolist() == tokens.tolist()


def test_several_files_and_their_index(tmp_path):
    model, semantic = model_of("llama")
    path = written(model, semantic, tmp_path / "out", shard_bytes=20_000)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert_same_logits(model, loaded(path))
    read = folder.read(path, "init.from_hf")
    again = build(semantic, seed=None)
    convert.load(read, folder.check(read, semantic, "init.from_hf"), again, semantic)
    assert_same_bits(dict(again.state_dict()), dict(model.state_dict()))


def test_half_precision_is_read_as_it_is(tmp_path):
    model, semantic = model_of("llama")
    path = written(model, semantic, tmp_path / "out")
    loaded(path).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    read = folder.read(tmp_path / "half", "init.from_hf")
    again = build(semantic, seed=None)
    convert.load(read, folder.check(read, semantic, "init.from_hf"), again, semantic)
    halved = {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
    assert_same_bits(dict(again.state_dict()), halved)


def test_tied_weights_may_stand_in_the_file_twice_if_they_are_equal(tmp_path):
    model, semantic = model_of("zamba2")
    path = written(model, semantic, tmp_path / "out")
    tensors = load_file(path / "model.safetensors")
    first, other = (f"model.layers.{layer}.shared_transformer.input_layernorm.weight" for layer in (1, 4))
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), other: tensors[first].clone()}
    save_file(tensors, path / "model.safetensors")
    again = build(semantic, seed=None)
    read = folder.read(path, "init.from_hf")
    family = folder.check(read, semantic, "init.from_hf")
    convert.load(read, family, again, semantic)
    assert_same_bits(dict(again.state_dict()), dict(model.state_dict()))
    save_file(tensors | {other: tensors[first] + 1}, path / "model.safetensors")
    with pytest.raises(Exception, match="one tensor in the model, and differ"):
        convert.load(folder.read(path, "init.from_hf"), family, again, semantic)


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    model, semantic = model_of("llama")
    path = written(model, semantic, tmp_path / "out")
    with pytest.raises(ConfigError, match="is there already"):
        written(model, semantic, path)
    monkeypatch.setattr(export, "_write_weights", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        written(model, semantic, tmp_path / "other")
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


REFUSED = {
    "a block that no class has": (
        {"pattern": "2*(t d)", "blocks": {"t": {"heads": 4}, "d": {"width": 44}}}, ["layer 0 is 't' (retention)"],
    ),
    "keys that the nearest has not": (
        {"pattern": "2*(a d)", "blocks": {"a": {"heads": 4, "output_gate": True, "logit_scale": 0.5}, "d": {"width": 44}}},
        ["LlamaForCausalLM", "blocks.a.output_gate = true", "it would have false", "blocks.a.logit_scale = 0.5"],
    ),
    "a layer too many": (
        {"pattern": "a d c d c", "blocks": {"a": {"heads": 4, "qk_norm": True}, "c": {}, "d": {"width": 44}}},
        ["Lfm2ForCausalLM", "ends within a repeat of 'c/a d'"],
    ),
    "windows here and there": (
        {"pattern": "w d a d", "blocks": {"w": {"heads": 4, "window": 8}, "a": {"heads": 4}, "d": {"width": 44}}}, ["either all are 'w'"],
    ),
    "a bound of dt from above in Zamba2": (
        {"pattern": "m gm", "blocks": {"m": {"state_size": 8, "head_dim": 8, "dt_max": 0.5}, "g": {"heads": 4, "mlp_width": 8, "lora_rank": {"mlp": 2}}}},
        ["Zamba2ForCausalLM", "blocks.m.dt_max = 0.5"],
    ),
    "another eps than the one in Zamba2's code": (
        {"pattern": "m gm", "norm": {"eps": 1e-6}, "blocks": {"m": {"state_size": 8, "head_dim": 8}, "g": {"heads": 4, "mlp_width": 8, "lora_rank": {"mlp": 2}}}},
        ["norm.eps = 1e-06"],
    ),
}  # fmt: skip


def test_heads_that_do_not_divide_the_width_are_mistrals():
    blocks = {"a": {"heads": 3, "head_dim": 8}, "d": {"width": 44}}
    arch = {"pattern": "a d", "width": WIDTH, "blocks": blocks}
    assert table.family_of(resolve_model(arch, VOCAB)).model_type == "mistral", "LlamaConfig refuses them"


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_class_can_hold_is_refused_with_what_does_not_fit(name):
    arch, says = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        table.family_of(resolve_model({"width": WIDTH, **arch}, VOCAB))
    assert "--safetensors" in str(caught.value)
    assert [text for text in says if text not in str(caught.value)] == [], str(caught.value)


@pytest.fixture
def checkpoint(tmp_path):
    model, semantic = model_of("llama")
    return written(model, semantic, tmp_path / "out"), semantic


def refusal(path: Path, semantic: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        folder.check(folder.read(path, "init.from_hf"), semantic, "init.from_hf")
    return str(caught.value)


def test_missing_surplus_and_misshapen_tensors_are_all_named(checkpoint):
    path, semantic = checkpoint
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(7, WIDTH)
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"].to(torch.int8)
    tensors |= {"model.extra.weight": torch.zeros(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(tensors, path / "model.safetensors")
    text = refusal(path, semantic)
    for said in (
        "lacks model.norm.weight, model.layers.1.mlp.up_proj.weight.",
        "no place for: model.extra.weight.",
        "q_proj.weight is [7, 32] in model.safetensors; the model needs [48, 32]",
        "k_proj.weight holds I8",
    ):
        assert said in text
    assert "inv_freq" not in text, "older versions stored it, and nobody needs it"


def test_keys_that_config_json_contradicts_are_all_named(checkpoint):
    path, semantic = checkpoint
    config = json.loads((path / "config.json").read_text())
    config |= {
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    (path / "config.json").write_text(json.dumps(config))
    text = refusal(path, semantic)
    assert "arch.blocks.a.kv_heads = 2" in text and "num_key_value_heads: 1. Set arch.blocks.a.kv_heads=1." in text
    assert "arch.norm.eps = 1e-06" in text and "arch.blocks.a.rope_theta = 10000.0" in text
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "config.json has 6 layers, a d a d a d; the pattern has 4, a d a d" in refusal(path, semantic)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"model_type": "bert"}, "model_type = 'bert' is none of those that zexp reads: llama, mistral"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None"),
    ],
)
def test_a_config_that_is_no_model_of_ours_says_why(checkpoint, change, says):
    path, semantic = checkpoint
    config = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(config))
    assert says in refusal(path, semantic)


def test_folders_that_are_no_checkpoints_are_refused(checkpoint, tmp_path):
    path, semantic = checkpoint
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[:-4])
    assert "It is cut off" in refusal(path, semantic)
    (path / "model.safetensors").write_bytes(b"not a safetensors file")
    assert "is no safetensors file" in refusal(path, semantic)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "there is config.json, generation_config.json, pytorch_model.bin" in refusal(path, semantic)
    (path / "config.json").unlink()
    assert "has no config.json" in refusal(path, semantic)
    with pytest.raises(ConfigError, match="no such folder"):
        folder.read(tmp_path / "nowhere", "init.from_hf")


PUBLISHED = {
    "llama3p2_1b": "Llama", "pythia_160m": "GPTNeoX", "pythia_2p8b": "GPTNeoX", "mixtral_8x7b": "Mixtral", "mamba_130m": "Mamba",
    "mamba2_2p7b": "Mamba2", "zamba_7b": "Zamba", "zamba2_1p2b": "Zamba2", "zamba2_2p7b": "Zamba2", "zamba2_7b": "Zamba2",
    "jamba_v0p1": "Jamba", "nemotron_h_8b": "NemotronH", "lfm2_1p2b": "Lfm2",
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_models_preset_fits_into_its_class(preset):
    arch: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"arch/{preset}.yaml"))
    semantic = resolve_model(arch, arch["vocab_size"])
    family = table.family_of(semantic)
    assert family.class_name == f"{PUBLISHED[preset]}ForCausalLM"
    numbers = sum(math.prod(theirs.shape) for piece in family.tensors(Parts(semantic)) for theirs in piece.theirs)
    assert numbers == calc_model.parameters(semantic)["total"]
