"""export, sample and init.from_hf as a user types them: from a checkpoint in, through training, out again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zexp.data import tokenizer as tokenizers
from zexp.data import windows
from zexp.store.folder import Store
from zexp.train.checkpoint import load_model

transformers = pytest.importorskip("transformers", reason="the folders are for transformers: zexp[hf]")

pytestmark = pytest.mark.slow

SIZES = (
    "seq_len=64",
    "phases.pretrain.tokens=3K",
    "phases.pretrain.batch_tokens=512",
    "schedule=constant",
    "schedule.warmup_tokens=0",
    "execution.log_every=1",
)
RUN = ("corpus=mine", "mix=mine", "eval=none", "anneal=none", *SIZES)
ARCH = """\
pattern: 2*(a d)
width: 32
blocks: {a: {heads: 4, kv_heads: 2}, d: {width: 44}}
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", **more}


def zexp(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zexp.cli", *words]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of one's own in which `llama`, which transformers has, and `mine`, which it has not, are trained."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    made = tmp_path_factory.mktemp("cli") / "mine"
    assert zexp("init", str(made), cwd=made.parent).returncode == 0
    (made / "conf/arch/llama.yaml").write_text(ARCH)
    done = zexp("run", "-m", "arch=llama,mine", "study.name=both", *RUN, cwd=made)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


@pytest.fixture(scope="module")
def exported(folder) -> Path:
    done = zexp("export", "llama", "--hf", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "a LlamaForCausalLM, 31,136 parameters after 3,072 tokens" in done.stdout
    return folder / "out"


def ours(folder: Path, name: str):
    """(model, tokenizer) of the end of a variant of `both`."""
    store = Store(folder / "store", patience=0)
    rows = json.loads((folder / "store/studies/both/variants.json").read_text())["variants"]
    segment, _, tokens = next(row["segments"][-1] for row in rows if row["name"] == name).partition("@")
    model, _, tokenizer_id = load_model(store, store.find(segment)[0].id, int(tokens))
    return model, tokenizers.load(store, tokenizer_id)


def test_transformers_gives_the_logits_of_an_exported_model(folder, exported):
    model, _ = ours(folder, "llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokens = torch.randint(512, (2, 37))
    with torch.no_grad():
        expected = model.logits(model(tokens))
        assert (theirs(tokens).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert theirs.config.max_position_embeddings == 64
    assert theirs.generation_config.eos_token_id == theirs.generation_config.bos_token_id == 0


def test_transformers_gives_the_ids_of_an_exported_tokenizer(folder, exported):
    _, tokenizer = ours(folder, "llama")
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    assert (theirs.eos_token, theirs.eos_token_id, theirs.bos_token_id) == ("<|eod|>", 0, 0)
    for text in ("one and two make 3", "  Ωμέγα\n\n\t🙂 e\u0301", "", "a text with <|eod|> in it"):
        ids = tokenizers.encode(tokenizer, [text])[0]
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == text


def test_safetensors_are_ours_for_any_model(folder):
    done = zexp("export", "both/mine", "--safetensors", "plain", cwd=folder)
    assert done.returncode == 0, done.stderr
    model, _ = ours(folder, "mine")
    tensors = load_file(folder / "plain/model.safetensors")
    assert tensors.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(tensors[name], parameter) for name, parameter in model.named_parameters())
    facts = json.loads((folder / "plain/model.json").read_text())
    assert facts["model"] == model.semantic and facts["tokens"] == 3072 and facts["seq_len"] == 64
    assert (folder / "plain/tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("export", "mine", "--hf", "other"),
            ["no class of `transformers` can hold this model", "blocks.d.activation = swiglu", "--safetensors"],
        ),
        (("export", "llama", "--hf", "texts"), ["texts is there already, and export overwrites nothing"]),
        (("export", "llama", "--hf", "no/such/place"), ["no such folder to make place in"]),
        (("export", "lama", "--hf", "other"), ["'lama' names no stage of"]),
        (("export", "llama"), ["--hf", "--safetensors"]),
        (("sample", "lama"), ["'lama' names no stage of"]),
        (
            ("sample", "llama", "--tokens", "0", "--top-p", "0", "--temperature", "-1", "--seed", "-1"),
            ["--tokens 0", "--top-p 0.0", "--temperature -1.0", "--seed -1"],
        ),
        (("plan", "arch=llama", *RUN, "init.from_hf=texts"), ["init.from_hf", "texts has no config.json"]),
    ],
)
def test_wrong_requests_are_said_at_once_and_write_nothing(folder, words, says):
    before = sorted(folder.iterdir())
    done = zexp(*words, cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert [text for text in says if text not in done.stderr] == [], done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(folder.iterdir()) == before


def test_what_is_wrong_is_found_without_torch(folder):
    code = (
        "import sys; from zexp.cli import main; "
        "codes = [main(['export', 'mine', '--hf', 'other']), main(['sample', 'llama', '--tokens', '0'])]; "
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.stdout == "[2, 2] False\n", done.stderr


def test_greedy_text_is_that_of_full_passes(folder):
    done = zexp("sample", "llama", "one and two", "--tokens", "12", "--temperature", "0", cwd=folder)
    assert done.returncode == 0, done.stderr
    model, tokenizer = ours(folder, "llama")
    tokens = [0, *tokenizers.encode(tokenizer, ["one and two"])[0]]
    prompt = len(tokens)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model.logits(model(torch.tensor([tokens]))[0, -1]).argmax()))
    assert done.stdout == tokenizer.decode(tokens[prompt:]) + "\n"


def test_a_seed_is_a_text(folder):
    texts = [
        zexp("sample", "both/llama", "--tokens", "40", "--seed", seed, cwd=folder).stdout for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) > 10


def test_ctrl_c_ends_a_sample_cleanly(folder):
    words = [sys.executable, "-m", "zexp.cli", "sample", "llama", "--tokens", "1000000", "--temperature", "2", "--top-p", "1"]
    process = subprocess.Popen(
        words,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run behind a shell's &
    )
    try:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, b"Interrupted.\n")
    assert out.endswith(b"\n")


def checkpoint(folder: Path) -> Path:
    """A Llama of transformers with random weights and more rows than its tokenizer, whose documents end with </s>."""
    if (folder / "in").is_dir():
        return folder / "in"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train([str(folder / "texts/sums.txt")], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder / "in"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=360, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=44,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # its initial weights would give any model's loss, ln V
    model.save_pretrained(folder / "in")
    return folder / "in"


def test_a_training_that_starts_from_a_checkpoint(folder):
    path = checkpoint(folder)
    given = ("init.from_hf=in", "corpus.tokenizer={kind:hf,path:in}", "+arch.vocab_size=360", "study.name=given")
    done = zexp("run", "arch=llama", *RUN, *given, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    store = Store(folder / "store", patience=0)
    rows = json.loads((folder / "store/studies/given/variants.json").read_text())["variants"]
    [segment] = rows[0]["segments"]
    trained = store.find(segment.partition("@")[0], "trajectory")[0]
    first = next(iter(trained.attempts()[0].metrics()))
    semantic = trained.semantic()
    assert "seeds" not in semantic

    # The first step's loss is computed with the checkpoint's own weights, on the first windows of the corpus.
    [entry] = semantic["streams"]
    bins = windows.open(store, entry["packing"])
    tokens, documents = (
        torch.stack(part)
        for part in zip(*(map(torch.as_tensor, one) for one in _first(store, trained.id, bins)), strict=True)
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert first["loss"] == pytest.approx(_loss(theirs, tokens, documents), rel=1e-5)
    assert (tokens == 1).any(), "documents begin with the checkpoint's </s>"

    # Out again, with the tokenizer that came in; the untrained rows are still there.
    done = zexp("export", "given/llama", "--hf", "again", cwd=folder)
    assert done.returncode == 0, done.stderr
    back = transformers.AutoTokenizer.from_pretrained(folder / "again")
    assert (back.eos_token_id, len(back)) == (1, len(transformers.AutoTokenizer.from_pretrained(path)))
    before, after = load_file(path / "model.safetensors"), load_file(folder / "again/model.safetensors")
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in after.items()
    }
    theirs = transformers.AutoConfig.from_pretrained(folder / "again")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (back.bos_token_id, back.eos_token_id) == (1, 1)

    # The same content elsewhere is the same run, and a model's own export is a checkpoint as well.
    again = zexp("run", "arch=llama", *RUN, *given[1:], f"init.from_hf={path}", cwd=folder)
    assert again.returncode == 0 and "Nothing to train" in again.stdout
    further = ("init.from_hf=again", "corpus.tokenizer={kind:hf,path:again}", "+arch.vocab_size=360")
    assert zexp("plan", "arch=llama", *RUN, *further, cwd=folder).returncode == 0


def test_a_folder_of_ones_own_around_a_checkpoint(folder, tmp_path):
    path = checkpoint(folder)
    done = zexp("init", "around", "--from-hf", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arch = (tmp_path / "around/conf/arch/mine.yaml").read_text()
    assert "a LlamaForCausalLM" in arch and "pattern: 2*(a d)" in arch and "vocab_size: 360" in arch
    planned = zexp("plan", "--json", "+sweeps=mine", cwd=tmp_path / "around")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["variants"] == 2
    counted = json.loads(zexp("calc", "--json", "arch=mine", "corpus=mine", cwd=tmp_path / "around").stdout)
    assert counted["parameters"]["total"] == sum(
        tensor.numel() for tensor in load_file(path / "model.safetensors").values()
    )
    refused = zexp("init", "other", "--from-hf", str(folder / "texts"), cwd=tmp_path)
    assert refused.returncode == 2 and "has no config.json" in refused.stderr
    assert not (tmp_path / "other").exists()


def _first(store: Store, trajectory_id: str, bins: windows.Windows):
    """The windows of the first step."""
    from zexp.train.batches import Batches
    from zexp.train.chain import chain

    stream = Batches(store, chain(store, trajectory_id), "cpu").stream
    return [bins.read(stream.locate(item).bin) for item in range(512 // 64)]


@torch.no_grad()
def _loss(model: torch.nn.Module, tokens: torch.Tensor, documents: torch.Tensor) -> float:
    """Nats a label, every document by itself as in training."""
    total = count = 0
    for row, owners in zip(tokens, documents, strict=True):
        inputs, labels = row[:-1], row[1:]
        for document in owners[:-1].unique():
            own = owners[:-1] == document
            logits = model(inputs[own][None]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, labels[own], reduction="sum"))
            count += int(own.sum())
    return total / count
