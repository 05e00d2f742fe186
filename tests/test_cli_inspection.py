"""The commands inspect and verify, which need no model, and the errors of all commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hf_cachegen import CacheGenConfig, errors
from hf_cachegen.artifact import BASE_FILE, MANIFEST_FILE, manifest
from hf_cachegen.cli import errors as cli_errors
from hf_cachegen.cli import main
from hf_cachegen.cli.options import encoder_options
from hf_cachegen.cli.output import plain
from tests.cli_support import DIM, HEADS, LAYERS, TOKENS, run, run_json, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("artifact") / "context")


def rewrite(folder: Path, **changes: object) -> Path:
    """Change members of the manifest, and its checksum."""
    path = folder / MANIFEST_FILE
    members = json.loads(path.read_text())
    members.update(changes)
    members.pop("xxh3")
    lines = ["{"] + [f"{json.dumps(name)}:{json.dumps(value)}," for name, value in sorted(members.items())]
    body = ("\n".join(lines) + "\n").encode()
    path.write_bytes(body + f'"xxh3":"{manifest.digest(body)}"\n}}\n'.encode())
    return folder


def test_inspect_prints_everything_as_json(folder: Path) -> None:
    found = run_json("inspect", folder)
    assert (found["tokens"], found["batch"], found["dtype"], found["chunks"]) == (TOKENS, 1, "float32", 3)
    assert found["exact_bytes"] == 2 * LAYERS * HEADS * TOKENS * DIM * 4
    assert found["files"] == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert found["bytes"] == sum(found["files"].values()) == found["levels"][-1]["bytes"]
    assert [row["level"] for row in found["levels"]] == [1, 2, 3]
    assert found["levels"][0]["bytes"] < found["levels"][1]["bytes"] < found["levels"][2]["bytes"]
    elements = found["exact_bytes"] // 4
    assert found["levels"][2]["bits_per_element"] == pytest.approx(8 * found["bytes"] / elements)
    assert len(found["layers"]) == LAYERS
    for layer in found["layers"]:
        assert (layer["kind"], layer["heads"], layer["k_dim"]) == ("full", HEADS, DIM)
        assert layer["k_bits"] == sorted(layer["k_bits"])
        assert layer["v_error"] == sorted(layer["v_error"], reverse=True)
    assert found["fingerprint"] is None


def test_inspect_shows_tables(folder: Path) -> None:
    done = run("inspect", folder)
    assert done.exit_code == 0
    for shown in ("90 tokens", "bytes to load, by level", "K error %", "2x8", "fingerprint", "relative L2 errors"):
        assert shown in done.stdout


def test_inspect_without_measured_errors(tmp_path: Path) -> None:
    unmeasured = write(tmp_path / "unmeasured", measure=False)
    assert "were not measured" in run("inspect", unmeasured).stdout
    assert run("inspect", unmeasured, "--plot", tmp_path / "bits.png").exit_code == 0


@pytest.mark.parametrize(("name", "start"), [("bits.png", b"\x89PNG"), ("bits.svg", b"<?xml"), ("bits.PDF", b"%PDF")])
def test_inspect_plots(folder: Path, tmp_path: Path, name: str, start: bytes) -> None:
    assert run_json("inspect", folder, "--plot", tmp_path / name)["plot"] == str(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_inspect_refuses_other_kinds_of_picture(folder: Path, tmp_path: Path) -> None:
    done = run("inspect", folder, "--plot", tmp_path / "bits.txt")
    assert done.exit_code == cli_errors.USAGE
    assert ".png" in done.stderr
    assert not (tmp_path / "bits.txt").exists()


@pytest.mark.parametrize(
    "layers",
    [[], 7, [{}] * (LAYERS + 1), [{"k_bits": "many"}] * LAYERS, [{"k_bits": [1, 2]}] * LAYERS,
     [{"k_bits": [1, True, 2]}] * LAYERS, [{"k_bits": [1, -1, 2]}] * LAYERS],
    ids=["none", "number", "too-many", "text", "too-few-levels", "truth", "negative"],
)  # fmt: skip
def test_inspect_refuses_a_report_of_another_shape(tmp_path: Path, layers: object) -> None:
    other = rewrite(write(tmp_path / "other"), report={"layers": layers})
    found = run_json("inspect", other, code=cli_errors.ARTIFACT)
    assert found["error"]["type"] == "ManifestError"
    assert "report.layers" in found["error"]["message"]


def test_inspect_without_a_report(tmp_path: Path) -> None:
    other = rewrite(write(tmp_path / "other"), report={})
    assert "k_bits" not in run_json("inspect", other)["layers"][0]
    assert run("inspect", other).exit_code == 0
    assert run("inspect", other, "--plot", tmp_path / "bits.png").exit_code == cli_errors.ARTIFACT


def test_an_untrusted_manifest_cannot_control_the_terminal(tmp_path: Path) -> None:
    other = rewrite(write(tmp_path / "other"), writer="\x1b[2Jevil [red]writer\x07", extra={"\x1b]0;": 1})
    shown = run("inspect", other).stdout
    assert "\x1b[2J" not in shown
    assert "[red]writer" in shown
    assert plain("a\nb\x9b") == "a\ufffdb\ufffd"


def test_verify(folder: Path) -> None:
    found = run_json("verify", folder)
    assert found["sound"] is True
    assert found["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    done = run("verify", folder)
    assert done.exit_code == 0
    assert "sound" in done.stdout


@pytest.mark.parametrize("file", ["base", "refine-1", "refine-2", "tokens"])
def test_verify_finds_a_flipped_bit_in_any_file(tmp_path: Path, file: str) -> None:
    damaged, name = write(tmp_path / "damaged"), f"{file}.safetensors"
    data = bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / name).write_bytes(data)
    assert run_json("verify", damaged, code=cli_errors.ARTIFACT)["error"]["type"] == "CorruptError"


def test_verify_finds_a_cut_file(tmp_path: Path) -> None:
    damaged = write(tmp_path / "damaged")
    path = damaged / BASE_FILE
    path.write_bytes(path.read_bytes()[:-1])
    done = run("verify", damaged)
    assert done.exit_code == cli_errors.ARTIFACT
    assert done.stderr.startswith("hf-cachegen: error: expected base.safetensors to have ")
    assert done.stderr.count("\n") == 1


def test_a_later_format_version_is_unsupported(tmp_path: Path) -> None:
    later = rewrite(write(tmp_path / "later"), format_version=2)
    for command in ("inspect", "verify"):
        assert run_json(command, later, code=cli_errors.UNSUPPORTED)["error"]["type"] == "UnsupportedFormatError"


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_no_artifact(tmp_path: Path, command: str) -> None:
    done = run(command, tmp_path)
    assert done.exit_code == cli_errors.ARTIFACT
    assert str(tmp_path) in done.stderr
    assert done.stdout == ""


def test_generate_finds_a_missing_artifact_before_it_loads_a_model(tmp_path: Path) -> None:
    found = run_json(
        "generate", tmp_path / "none", "--model", tmp_path / "none", "--prompt", "w1", code=cli_errors.ARTIFACT
    )
    assert found["error"]["exit_code"] == cli_errors.ARTIFACT


@pytest.mark.parametrize(
    "arguments",
    [["encode"], ["verify", "--nonsense"], ["nonsense"], ["inspect", "a", "b"], ["generate", "a", "--model", "m"]],
    ids=" ".join,
)
def test_usage_errors_are_one_line_or_one_object(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.exit_code == cli_errors.USAGE
    assert re.fullmatch(r"hf-cachegen: error: .* \(see 'hf-cachegen.* --help'\)\n", done.stderr)
    assert run_json(*arguments, code=cli_errors.USAGE)["error"]["exit_code"] == cli_errors.USAGE


def test_no_command_shows_the_help() -> None:
    done = run()
    assert done.exit_code == cli_errors.USAGE
    assert all(command in done.stderr for command in main.commands)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" not in run("inspect", tmp_path).stderr
    assert "Traceback" in run("inspect", tmp_path, "--debug").stderr


def test_an_unexpected_error_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("hf_cachegen.cli.inspection.describe", fail)
    done = run("inspect", folder)
    assert done.exit_code == cli_errors.UNEXPECTED
    assert done.stderr == "hf-cachegen: error: RuntimeError: two lines (use --debug for the traceback)\n"


def test_an_interrupt_ends_quietly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_cachegen.cli.inspection.describe", interrupt)
    done = run("inspect", folder)
    assert done.exit_code == cli_errors.INTERRUPTED
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 2), (errors.LevelError("x"), 2), (errors.ArtifactExistsError("x"), 2),
        (errors.ArtifactNotFoundError("x"), 3), (errors.ManifestError("x"), 3), (errors.CorruptError("x"), 3),
        (errors.TruncatedError("x"), 3), (errors.LimitError("x"), 3),
        (errors.WrongModelError("x"), 4), (errors.WrongWeightsError("x"), 4), (errors.WrongDtypeError("x"), 4),
        (errors.WrongTokenizerError("x"), 4), (errors.PromptMismatchError("x"), 4),
        (errors.UnsupportedFormatError("x"), 5), (errors.UnsupportedLayerError("x"), 5),
        (errors.UnsupportedModelError("x"), 5), (errors.MissingExtraError("x"), 5),
        (errors.ProfileError("x"), 6), (errors.TensorError("x"), 3), (errors.NativeError("x"), 1), (OSError("x"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)  # fmt: skip
def test_exit_codes(error: Exception, code: int) -> None:
    assert cli_errors.exit_code(error) == code
    assert code in cli_errors.EXIT_CODES


def test_every_field_of_the_configuration_is_an_option() -> None:
    def command(**_: object) -> None:
        pass

    options = {parameter.name: parameter for parameter in encoder_options(command).__click_params__}  # type: ignore[attr-defined]
    defaults = CacheGenConfig()
    assert set(options) == set(CacheGenConfig.__dataclass_fields__)
    assert all(option.default == getattr(defaults, name) for name, option in options.items())


@pytest.mark.parametrize(
    "changed",
    [1, [], {"target": "x"}, {"target": float(10**9), "tokens": -1}, {"continuations": True}, {"kl": [1.0]},
     {"low": None}, {"high": [0.1, "x", 0.1]}],
)  # fmt: skip
def test_inspect_refuses_a_measured_target_of_another_shape(tmp_path: Path, changed: object) -> None:
    sound = {
        "target": 0.01, "kl": [0.3, 0.1, 0.01], "low": [0.2, 0.0, 0.0], "high": [0.4, 0.2, 0.1], "continuations": 8,
        "tokens": 64, "passes": 100,
    }  # fmt: skip
    path = write(tmp_path / "other")
    assert run_json("inspect", rewrite(path, report={"target_kl": sound}))["target_kl"]["passes"] == 100
    found = {**sound, **changed} if isinstance(changed, dict) else changed
    other = rewrite(path, report={"target_kl": found})
    message = run_json("inspect", other, code=cli_errors.ARTIFACT)["error"]["message"]
    assert "report.target_kl" in message
