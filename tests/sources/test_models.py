"""Model specifications and checkpoints: what loads, what is filled in, and what every wrong one is told."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.sources.checkpoints import load_checkpoint
from lobo_fx.sources.libraries import head_outputs
from lobo_fx.sources.models import build, build_program, weights_are_random
from lobo_fx.sources.user_code import call_from_file, function_from_file

save_file = pytest.importorskip("safetensors.torch").save_file


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Tied(nn.Module):
    """The output layer's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


class Base(nn.Module):
    base_model_prefix = "base"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


class WithHead(nn.Module):
    base_model_prefix = "base"

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.base = Base()
        self.head = nn.Linear(2, outputs)


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Checkpoints.


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_a_checkpoint_fills_a_model(suffix: str, tmp_path: Path) -> None:
    source, target = network(), network()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path)
    assert not same(source, target)
    load_checkpoint(target, path)
    assert same(source, target)


def test_a_tied_weight_may_be_missing(tmp_path: Path) -> None:
    source, target = Tied(), Tied()
    save_file({"embedding.weight": source.embedding.weight.detach()}, tmp_path / "tied.safetensors")
    load_checkpoint(target, tmp_path / "tied.safetensors")
    assert torch.equal(target.head.weight, source.embedding.weight)
    assert target.head.weight is target.embedding.weight


def test_a_weight_that_is_not_tied_may_not_be_missing(tmp_path: Path) -> None:
    target = Tied()
    target.head.weight = nn.Parameter(torch.zeros(5, 4))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    save_file({"embedding.weight": torch.ones(5, 4)}, tmp_path / "untied.safetensors")
    with pytest.raises(InvalidInput, match=r"does not fit Tied; missing: head\.weight$"):
        load_checkpoint(target, tmp_path / "untied.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_the_base_model_takes_its_part_of_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    source, target = WithHead(), Base()
    torch.save(source.state_dict(), tmp_path / "head.pt")
    load_checkpoint(target, tmp_path / "head.pt")
    assert same(source.base, target)


class Compiled(nn.Module):
    """A model whose one part was compiled by `torch.compile`; and then another like it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(), nn.Linear(2, 2)
        self.first.add_module("_orig_mod", nn.Linear(2, 2))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_leave_no_trace_in_names(prefix: str, tmp_path: Path) -> None:
    """Twins: a checkpoint of which a part has the prefix, and a model that has such names itself."""
    source, target = WithHead(), WithHead()
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    torch.save(state, tmp_path / "wrapped.pt")
    load_checkpoint(target, tmp_path / "wrapped.pt")
    assert same(source, target)
    wrapped, again = (nn.DataParallel(module) for module in (source, WithHead()))
    torch.save(wrapped.state_dict(), tmp_path / "own.pt")
    load_checkpoint(again, tmp_path / "own.pt")
    assert same(wrapped, again)
    torch.save({"module.head.weight": torch.ones(3, 2), **source.state_dict()}, tmp_path / "part.pt")
    with pytest.raises(InvalidInput, match=r"unexpected: module\.head\.weight"):
        load_checkpoint(target, tmp_path / "part.pt")


def test_a_wrapped_model_may_have_a_part_named_as_the_wrapper_names_it(tmp_path: Path) -> None:
    source = nn.ModuleDict({"module": nn.Linear(2, 2)})
    for name, saved in (("wrapped.pt", nn.DataParallel(source)), ("plain.pt", source)):
        target = nn.ModuleDict({"module": nn.Linear(2, 2)})
        torch.save(saved.state_dict(), tmp_path / name)
        load_checkpoint(target, tmp_path / name)
        assert same(source, target)


def test_a_part_that_was_compiled_has_its_own_name(tmp_path: Path) -> None:
    source, first = Compiled(), nn.Linear(2, 2)
    plain = nn.ModuleDict({"first": first, "second": nn.Linear(2, 2)})
    torch.save(source.state_dict(), tmp_path / "compiled.pt")
    load_checkpoint(plain, tmp_path / "compiled.pt")
    assert torch.equal(first.weight, source.state_dict()["first._orig_mod.weight"])
    again = Compiled()
    load_checkpoint(again, tmp_path / "compiled.pt")
    assert same(source, again)


def test_a_model_with_a_head_needs_the_head(tmp_path: Path) -> None:
    source, target = Base(), WithHead()
    torch.save(source.state_dict(), tmp_path / "base.pt")
    with pytest.raises(InvalidInput, match=r"missing: head\.weight, head\.bias$"):
        load_checkpoint(target, tmp_path / "base.pt")
    torch.save({**source.state_dict(), **{f"base.{n}": t for n, t in source.state_dict().items()}}, tmp_path / "odd.pt")
    with pytest.raises(InvalidInput, match="unexpected"):
        load_checkpoint(target, tmp_path / "odd.pt")


def test_what_does_not_fit_is_named_and_the_model_left_alone(tmp_path: Path) -> None:
    torch.save(WithHead(7).state_dict() | {"more": torch.ones(1)}, tmp_path / "seven.pt")
    target = WithHead(3)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(InvalidInput, match="does not fit WithHead") as error:
        load_checkpoint(target, tmp_path / "seven.pt")
    assert "unexpected: more" in str(error.value)
    assert "of another shape: head.weight ([7, 2], the model has [3, 2])" in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    torch.save(network().state_dict(), tmp_path / "other.pt")
    with pytest.raises(InvalidInput, match=r"missing: base\.layer\.weight, base\.layer\.bias, head\.weight and 1 more"):
        load_checkpoint(target, tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (torch.ones(3, dtype=torch.int8), "int8"),
        (torch.ones(3, dtype=torch.complex64), "complex64"),
        (torch.ones(3).to_sparse(), "sparse float32"),
        (torch.ones(3, device="meta"), "valueless float32"),
    ],
)
def test_values_of_a_type_that_would_lose_them_are_refused(stored: torch.Tensor, told: str, tmp_path: Path) -> None:
    """Whole numbers may be codes, which need their scales."""
    target = WithHead()
    torch.save(target.state_dict() | {"head.bias": stored}, tmp_path / "weights.pt")
    with pytest.raises(InvalidInput, match=rf"of another type: head\.bias \({told}, the model has float32\)"):
        load_checkpoint(target, tmp_path / "weights.pt")


def test_digits_may_be_more_or_fewer(tmp_path: Path) -> None:
    target = WithHead()
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        torch.save(
            {name: torch.full_like(t, 0.5).to(kind) for name, t in target.state_dict().items()}, tmp_path / "w.pt"
        )
        load_checkpoint(target, tmp_path / "w.pt")
        assert all(bool((tensor == 0.5).all()) and tensor.dtype == torch.float32 for tensor in target.parameters())


def write_shards(folder: Path, model: nn.Module) -> Path:
    names = list(model.state_dict())
    files = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: model.state_dict()[name] for name in names if files[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


@pytest.mark.parametrize("what", ["index", "folder"])
def test_shards_are_put_together(what: str, tmp_path: Path) -> None:
    source, target = network(), network()
    index = write_shards(tmp_path, source)
    load_checkpoint(target, index if what == "index" else tmp_path)
    assert same(source, target)


def test_a_missing_shard_and_a_broken_index(tmp_path: Path) -> None:
    index = write_shards(tmp_path, network())
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(InvalidInput, match=r"no file .*model-1\.safetensors"):
        load_checkpoint(network(), index)
    for file in ("../outside.safetensors", index.name):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(InvalidInput, match="no index of shards"):
            load_checkpoint(network(), index)
    index.write_text("{")
    with pytest.raises(InvalidInput, match="no JSON file"):
        load_checkpoint(network(), index)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"weight": Payload(tmp_path / "marker")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InvalidInput, match=r"evil\.pt holds more than tensors, and loading it would run its code"):
        load_checkpoint(network(), path)
    assert not (tmp_path / "marker").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "marker").exists(), "the payload does not work, so nothing was tested"


def truncated(path: Path) -> bytes:
    torch.save(network().state_dict(), path)
    return path.read_bytes()[:-200]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", ["empty", "text", "truncated", "noise"])
def test_a_damaged_checkpoint_is_called_damaged(suffix: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad{suffix}"
    written = {
        "empty": b"",
        "text": b"hello there, this is text",
        "truncated": truncated(tmp_path / "whole.pt"),
        "noise": bytes(range(256)) * 8,
    }
    path.write_bytes(written[content])
    with pytest.raises(InvalidInput, match="is empty" if content == "empty" else "damaged") as error:
        load_checkpoint(network(), path)
    assert str(path) in str(error.value)
    assert "run its code" not in str(error.value)


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no file .*missing\.pt"):
        load_checkpoint(network(), tmp_path / "missing.pt")
    with pytest.raises(InvalidInput, match=r"holds none of model\.safetensors"):
        load_checkpoint(network(), tmp_path)
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(InvalidInput, match="holds a Tensor; expected"):
        load_checkpoint(network(), tmp_path / "tensor.pt")
    torch.save({"epoch": 3, "model": network().state_dict()}, tmp_path / "training.pt")
    with pytest.raises(InvalidInput, match=r"holds more than named tensors \(epoch, model\)"):
        load_checkpoint(network(), tmp_path / "training.pt")
    with (tmp_path / "plain.pt").open("wb") as stream:
        pickle.dump({"a": 1}, stream)
    with pytest.raises(InvalidInput, match=r"plain\.pt"):
        load_checkpoint(network(), tmp_path / "plain.pt")


# Hugging Face folders.


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.fixture
def bert(transformers: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )


def test_a_saved_model_whose_weights_are_tied_comes_back(bert: Any, transformers: Any, tmp_path: Path) -> None:
    source = transformers.BertForMaskedLM(bert)
    source.save_pretrained(tmp_path)
    built, _ = build(f"transformers:{tmp_path}")
    assert isinstance(built, transformers.BertForMaskedLM)
    assert same(built, source)
    assert not weights_are_random(f"transformers:{tmp_path}", None)


def test_a_sharded_model_comes_back(bert: Any, transformers: Any, tmp_path: Path) -> None:
    source = transformers.BertModel(bert)
    source.save_pretrained(tmp_path, max_shard_size="2KB")
    assert not (tmp_path / "model.safetensors").exists()
    built, _ = build(f"transformers:{tmp_path}")
    assert isinstance(built, nn.Module)
    assert same(built, source)


def test_the_base_of_a_saved_model_with_a_head(bert: Any, transformers: Any, tmp_path: Path) -> None:
    source = transformers.BertForSequenceClassification(bert)
    source.save_pretrained(tmp_path)
    target = transformers.BertModel(bert)
    load_checkpoint(target, tmp_path)
    assert same(target, source.bert)
    with pytest.raises(InvalidInput, match=r"missing: .*cls\.predictions"):
        load_checkpoint(transformers.BertForMaskedLM(bert), tmp_path)


def test_a_folder_without_weights_gives_random_ones(bert: Any, tmp_path: Path) -> None:
    bert.save_pretrained(tmp_path)
    assert weights_are_random(f"transformers:{tmp_path}", None)
    first, second = build(f"transformers:{tmp_path}")[0], build(f"transformers:{tmp_path}")[0]
    assert isinstance(first, nn.Module)
    assert isinstance(second, nn.Module)
    assert same(first, second)


TINY_BERT = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_BART = {"vocab_size": 11, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
TINY_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "bert", **TINY_BERT}, "BertForMaskedLM"),
        ({"model_type": "bert", **TINY_BERT, "architectures": ["BertModel"]}, "BertModel"),
        (
            {"model_type": "bert", **TINY_BERT, "architectures": ["BertForTokenClassification"]},
            "BertForTokenClassification",
        ),
        ({"model_type": "bart", **TINY_BART}, "BartForConditionalGeneration"),
        ({"model_type": "clip_text_model", **TINY_BERT}, "CLIPTextModel"),
    ],
)
@pytest.mark.usefixtures("transformers")
def test_a_model_has_the_head_that_its_configuration_names_or_that_of_its_task(
    config: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(build(f"transformers:{tmp_path}")[0]).__name__ == kind


def output_names(program: Program) -> list[str]:
    return [spec.name for spec in program.signature.outputs if spec is not None]


def test_the_outputs_of_a_head_are_kept_and_others_by_name(transformers: Any, tmp_path: Path) -> None:
    transformers.BartConfig(**TINY_BART).save_pretrained(tmp_path)
    program = build_program(f"transformers:{tmp_path}")
    assert output_names(program) == ["logits"]
    assert "outputs left out: encoder_last_hidden_state; kept: logits" in "".join(map(str, program.notes))
    asked = build_program(f"transformers:{tmp_path}", outputs=["encoder_last_hidden_state"])
    assert output_names(asked) == ["encoder_last_hidden_state"]
    assert not any("left out" in str(note) for note in asked.notes)
    assert len(list(asked.module.parameters())) < len(list(program.module.parameters()))


def test_a_model_without_a_head_and_one_of_the_user_keep_all_outputs(bert: Any, tmp_path: Path) -> None:
    bert.architectures = ["BertModel"]
    bert.save_pretrained(tmp_path)
    assert output_names(build_program(f"transformers:{tmp_path}")) == ["last_hidden_state", "pooler_output"]
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n    def forward(self, x):\n"
        "        return {'logits': x, 'hidden_states': x + 1}\n\ndef make():\n    return Net(), torch.ones(2, 3)\n"
    )
    spec = f"{tmp_path}/net.py:make"
    assert output_names(build_program(spec)) == ["logits", "hidden_states"]
    assert output_names(build_program(spec, outputs=["hidden_states"])) == ["hidden_states"]
    with pytest.raises(InvalidInput, match="did you mean logits"):
        build_program(spec, outputs=["logit"])


def test_what_layers_give_and_keep_is_no_output_of_a_head() -> None:
    names = ["loss", "logits", "past_key_values.0.0", "hidden_states.1", "text_model_output.pooler_output"]
    names += ["cross_attentions.0", "encoder_last_hidden_state", "pred_boxes", "states"]
    assert head_outputs(names) == ["loss", "logits", "pred_boxes", "states"]
    assert head_outputs(["last_hidden_state", "pooler_output"]) == ["last_hidden_state", "pooler_output"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "no JSON file"),
        ("[]", "holds a list"),
        ("", "no JSON file"),
        ('{"model_type": "bort"}', "did you mean bart or bert"),
        ("{}", "transformers has no model ''"),
        ('{"model_type": "bert", "architectures": ["AutoModel"]}', "names no model"),
        ('{"model_type": "bert", "architectures": ["pipeline"]}', "names no model"),
        ('{"model_type": "bert", "architectures": ["BertConfig"]}', "names no model"),
        ('{"model_type": "bert", "architectures": ["NoSuchModel"]}', "names no model"),
        ('{"model_type": "bert", "architectures": [3]}', "names no model"),
        ('{"model_type": "bert", "architectures": "BertModel"}', "names no model"),
        ('{"model_type": "bert", "hidden_size": 10, "num_attention_heads": 3}', "transformers can't build"),
    ],
)
@pytest.mark.usefixtures("transformers")
def test_a_broken_configuration_is_refused(config: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InvalidInput, match=words):
        build(f"transformers:{tmp_path}")


@pytest.mark.usefixtures("transformers")
def test_a_folder_without_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"has no config\.json"):
        build(f"transformers:{tmp_path}")


# Specifications.


@pytest.mark.parametrize(
    "spec", ["", ":", "resnet50", "torchvision:", ":resnet50", r"C:\models\net.py", "C:/net", "a:b:c", "http://host/x"]
)
def test_a_specification_that_names_no_model(spec: str) -> None:
    with pytest.raises(InvalidInput, match=r"names no model; write torchvision:NAME, timm:NAME, transformers:NAME"):
        build(spec)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    for spec in (f"{tmp_path}/net.py:make", r"C:\net.py:make", f"{tmp_path}/net.pt2"):
        with pytest.raises(InvalidInput, match=r"no file .*net\.p"):
            build(spec)
    with pytest.raises(InvalidInput, match="leave out the checkpoint"):
        build("net.pt2", tmp_path / "weights.pt")


def test_what_is_random_is_known() -> None:
    assert weights_are_random("torchvision:resnet18", None)
    assert weights_are_random("transformers:bert", None)
    assert not weights_are_random("torchvision:resnet18", Path("weights.pt"))
    assert not weights_are_random("net.py:make", None)


# The user's own file.

NETWORK = """\
from __future__ import annotations

import dataclasses

import torch
from torch import nn

from sizes_beside import WIDTH


@dataclasses.dataclass
class Config:
    width: int = WIDTH
    names: list[str] = dataclasses.field(default_factory=list)


def make():
    return nn.Linear(Config().width, 2)


def make_with_inputs():
    import more_beside

    return make(), torch.ones(more_beside.ROWS, WIDTH)


def three():
    return make(), 1, 2


def text():
    return "model"


def fail():
    helper()


def helper():
    raise KeyError("no such layer")


def leave():
    raise SystemExit(1)
"""


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(NETWORK.splitlines(), 1) if text in line)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    (tmp_path / "sizes_beside.py").write_text("WIDTH = 6\n")
    (tmp_path / "more_beside.py").write_text("ROWS = 3\n")
    path = tmp_path / "network.py"
    path.write_text(NETWORK)
    before = list(sys.path)
    yield path
    assert sys.path == [*before, str(tmp_path)]  # once, and last: it hides nothing
    sys.path[:] = before
    for name in ("sizes_beside", "more_beside", "lobo_fx_file_network"):
        sys.modules.pop(name, None)


def test_a_file_may_import_what_lies_beside_it_and_declare_dataclasses(file: Path) -> None:
    model, inputs = build(f"{file}:make")
    assert isinstance(model, nn.Linear)
    assert model.in_features == 6
    assert inputs is None
    _, inputs = build(f"{file}:make_with_inputs")
    assert isinstance(inputs, Inputs)
    assert inputs.args[0].shape == (3, 6)


def test_a_function_may_import_what_lies_beside_its_file_when_it_is_called(file: Path) -> None:
    with file.open("a") as stream:
        stream.write("\ndef width():\n    from sizes_later import WIDTH\n    return WIDTH\n")
    (file.parent / "sizes_later.py").write_text("WIDTH = 7\n")
    assert function_from_file(f"{file}:width")() == 7


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("mkae", "has no function 'mkae'; did you mean make"),
        ("WIDTH", "has no function 'WIDTH'"),
        ("three", "returns 3 values"),
        ("text", "gives a str; expected an nn.Module"),
        ("fail", rf"network\.py:{line_of('raise KeyError')}: KeyError: 'no such layer'"),
        ("leave", rf"network\.py:{line_of('raise SystemExit')}: SystemExit: 1"),
    ],
)
def test_a_function_that_can_not_be_used(function: str, words: str, file: Path) -> None:
    with pytest.raises(InvalidInput, match=words):
        build(f"{file}:{function}")


def test_the_users_exception_is_kept(file: Path) -> None:
    with pytest.raises(InvalidInput) as error:
        call_from_file(file, "fail")
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torch\nx = (\n", r"broken\.py:2: SyntaxError"),
        ("\nimport no_such_package\n", r"broken\.py:2: ModuleNotFoundError: No module named 'no_such_package'"),
        ("x = 1\ny = x / 0\n", r"broken\.py:2: ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_does_not_run_names_its_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=words):
        build(f"{path}:make")


def test_a_file_hides_no_module(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def make():\n    return 3\n")
    assert call_from_file(tmp_path / "json.py", "make") == 3
    assert sys.modules["json"] is json
