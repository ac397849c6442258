import os
import subprocess
import sys

import pytest

from mellmpi.cli import main
from mellmpi.cli.arguments import make_parser
from mellmpi.cli.flags import POLICIES
from mellmpi.cli.launcher import is_first, world_problem
from mellmpi.cli.parser import AT_ONCE_MS, read_options
from mellmpi.cli.values import byte_size
from mellmpi.config import UsageError
from mellmpi.runtime import doctor
from mellmpi.scheduler import policies
from mellmpi.workload import rows


def options(*arguments, environment=None, piped=False):
    return read_options(arguments, environment or {}, lambda: piped)


def test_the_command_line_beats_the_environment_which_beats_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("block-size: 8\nmax-num-seqs: 5\npolicy: best_fit\nenable-prefix-caching: true")
    environment = {"MELLMPI_MAX_NUM_SEQS": "6", "MELLMPI_POLICY": "worst_fit"}
    found = options("--config", str(file), "--policy", "frugal", environment=environment).config
    assert found.cache.block_size == 8 and found.cache.enable_prefix_caching
    assert found.batch.max_num_seqs == 6
    assert found.cluster.policy == "frugal"


def test_several_models_are_given_one_by_one(tmp_path):
    typed = options(
        "--model",
        "a",
        "--model",
        "b",
        "--served-model-name",
        "x",
        "--served-model-name",
        "y",
        "--dtype",
        "float32",
        "--worker-models",
        "x",
        "--worker-models",
        "x,y",
    ).config
    assert [(m.model, m.name, m.dtype) for m in typed.models] == [
        ("a", "x", "float32"),
        ("b", "y", "float32"),
    ]
    assert typed.worker_models == (("x",), ("x", "y"))
    environment = {
        "MELLMPI_MODEL": "a; b",
        "MELLMPI_SERVED_MODEL_NAME": "x;y",
        "MELLMPI_WORKER_MODELS": "x;x,y",
        "MELLMPI_DTYPE": "float32",
    }
    assert options(environment=environment).config == typed
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: [a, b]\nserved-model-name: [x, y]\nworker-models: [x, 'x,y']\ndtype: float32"
    )
    assert options("--config", str(file)).config == typed


def test_one_model_is_the_default():
    assert [m.model for m in options().config.models] == ["smollm2"]


def test_flags_may_precede_or_follow_the_command():
    before = options("--dtype", "float32", "run-batch", "-i", "a", "-o", "b")
    after = options("run-batch", "-i", "a", "-o", "b", "--dtype", "float32")
    assert before == after and before.command == "run-batch"


def test_without_a_command_the_server_or_the_piped_requests_run():
    assert options().command == "serve"
    assert options(piped=True).command == "pipe"
    assert options("-i", "a", "-o", "b").command == "run-batch"
    assert options("--replay", "a", piped=True).command == "run-batch"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--dtype", "int3"], "bfloat16"),
        (["--block-size", "0"], "--block-size"),
        (["--polcy", "frugal"], "--help"),
        (["--kv-cache-memory-bytes", "lots"], "--kv-cache-memory-bytes"),
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
        (["serve-coffee"], "run-batch"),
        (["--request-rate", "0"], "--request-rate"),
        (["--replay", "t.csv", "-i", "in.jsonl"], "leave one out"),
        (["--replay", "t.csv", "--request-rate", "3"], "--rate-scale"),
        (["--replay", "t.csv", "--length-scale", "-1"], "argument --length-scale"),
        (["--rate-scale", "2"], "goes with --replay"),
        (["--model", "a", "--model", "b", "--served-model-name", "c"], "give each model one"),
        (["--model", "a", "--model", "a"], "--served-model-name"),
        (["--model", "a", "--worker-models", "b"], "--worker-models b"),
    ],
)
def test_a_mistake_is_named_with_what_to_type_instead(arguments, hint):
    with pytest.raises(UsageError, match=hint):
        options(*arguments)


def test_unknown_keys_of_a_file_and_bad_values_of_the_environment_are_named(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("blok-size: 8")
    with pytest.raises(UsageError, match="blok-size"):
        options("--config", str(file))
    with pytest.raises(UsageError, match="MELLMPI_DTYPE"):
        options(environment={"MELLMPI_DTYPE": "int3"})


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("64M", 64 << 20), ("1.5GiB", 3 << 29), ("2kb", 2048), ("1T", 1 << 40)],
)
def test_suffixes_of_byte_sizes_are_powers_of_1024(text, size):
    assert byte_size(text) == size


def test_a_launcher_unknown_to_mpi_is_reported():
    assert "srun --mpi=pmix" in world_problem({"SLURM_STEP_NUM_TASKS": "4"}, 1)
    assert "another MPI" in world_problem({"OMPI_COMM_WORLD_SIZE": "4"}, 1)
    assert not world_problem({"SLURM_STEP_NUM_TASKS": "4"}, 4)
    assert not world_problem({"SLURM_NTASKS": "4"}, 1)  # a batch script's own shell: no step


def test_one_process_of_a_launch_prints_messages():
    assert is_first({}) and is_first({"SLURM_PROCID": "0"})
    assert not is_first({"OMPI_COMM_WORLD_RANK": "1"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seed: 1  # naïve\n".encode("latin-1"), "iconv -f LATIN1 -t UTF-8"),
        (b"seed: [1\n", "cannot be read"),
        (b"[" * 5000, "cannot be read"),
        (b"seed: \x00\n", "cannot be read"),
        (b"? [a]\n: 1\n", "cannot be read"),
        (b"- seed\n", "keys are the names of flags"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused_in_one_line(tmp_path, content, said):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_options(["--config", str(file)], {}, lambda: False)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_infinite_sizes_are_refused():
    with pytest.raises(UsageError, match="kv-cache-memory-bytes"):
        read_options(["--kv-cache-memory-bytes", "inf"], {}, lambda: False)
    with pytest.raises(UsageError, match="is no number of bytes"):
        read_options([], {"MELLMPI_KV_CACHE_MEMORY_BYTES": "1e999"}, lambda: False)


def test_a_launcher_variable_that_is_not_a_number_is_ignored():
    assert world_problem({"SLURM_STEP_NUM_TASKS": "", "PMI_SIZE": "many"}, 1) == ""


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--threads", wrong) for wrong in ("-3", "0", "1.5", "99999999999999", "9" * 5000)),
        ("--max-num-seqs", "1" + "0" * 23),
        ("--max-num-batched-tokens", "0"),
        ("--block-size", "1" + "0" * 18),
        ("--max-model-len", "1" + "0" * 30),
        ("--max-requests", "0"),
        ("--show", "-1"),
        *(("--seed", wrong) for wrong in ("-1", str(2**63))),
        *(("--kv-cache-memory-bytes", wrong) for wrong in ("-1", "0", "nan", "99999999T")),
        *(("--park-after-s", wrong) for wrong in ("-1", "nan", "inf", "1e300", "soon")),
        ("--rebalance-every-s", "nan"),
        ("--migration-limit-s", "inf"),
        ("--max-ttft-s", "0"),
        ("--target-step-ms", "1e300"),
        ("--gpu-memory-utilization", "nan"),
        ("--request-rate", "inf"),
        ("--rate-scale", "1e-300"),
        ("--length-scale", "nan"),
        ("--thrift", "1.1"),
    ],
)
def test_a_number_out_of_bounds_is_refused_by_the_name_of_its_flag(flag, value):
    with pytest.raises(UsageError, match=f"argument {flag}: .* is no ") as caught:
        options(flag, value)
    assert len(str(caught.value)) < 250
    variable = f"MELLMPI_{flag[2:].replace('-', '_').upper()}"
    with pytest.raises(UsageError, match=f"{variable}: "):
        options(environment={variable: value})


def test_the_smallest_and_largest_numbers_are_read():
    assert options("--seed", str(2**63 - 1), "--threads", "1").config.threads == 1
    assert options("--park-after-s", "0", "--show", "0").config.cluster.park_after_s == 0


def test_keys_of_a_file_that_are_not_text_are_named(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("1: a\nfoo: b\n")
    with pytest.raises(UsageError, match="1, foo: keys are the names of flags"):
        options("--config", str(file))


def test_a_key_without_a_value_is_ignored(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("max-num-seqs: null\nmodel:\nblock-size: 8\n")
    assert options("--config", str(file)) == options("--block-size", "8")


def test_a_pipe_without_a_writer_is_refused_as_a_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "FILLED_S", 0.0)
    pipe = tmp_path / "c.yaml"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match=f"nothing comes from {pipe}"):
        options("--config", str(pipe))


def test_the_command_doctor_may_follow_flags(monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "doctor", lambda config, job: asked.append(config) or 0)
    assert main(["--model", "tiny", "doctor"]) == 0
    assert asked[0].model.model == "tiny"


@pytest.mark.parametrize("before", [["--seed", "1"], ["--config", "x"], ["--model", "tiny"]])
def test_simulate_must_precede_its_flags(before, capsys):
    trace = ["--trace", "/no/such", "--kv-bytes-per-token", "1", "--gpu-kv-gib", "1", "--ideal"]
    assert main([*before, "simulate", *trace]) == 2
    assert "write the command first" in capsys.readouterr().err
    with pytest.raises(UsageError, match="write the command first"):
        options("--tick-s", "5", "simulate", *trace)


def test_a_kv_cache_larger_than_memory_ends_with_code_2(tmp_path):
    requests = tmp_path / "in.jsonl"
    requests.write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", '
        '"body": {"prompt": "a", "max_tokens": 1}}'
    )
    files = ["-i", str(requests), "-o", str(tmp_path / "out.jsonl")]
    tiny = ["--model", "random:tiny-llama", "--dtype", "float32", "--device", "cpu"]
    run = [sys.executable, "-m", "mellmpi", "run-batch", *files, *tiny]
    done = subprocess.run(
        [*run, "--kv-cache-memory-bytes", "1000T"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "--kv-cache-memory-bytes" in done.stderr and "Traceback" not in done.stderr


def test_a_batch_without_arrivals_limits_its_steps_by_tokens_only():
    files = ("-i", "a", "-o", "b")
    assert options("run-batch", *files).config.batch.target_step_ms == AT_ONCE_MS
    assert options("run-batch", *files, "--target-step-ms", "70").config.batch.target_step_ms == 70
    for interactive in (("run-batch", *files, "--request-rate", "4"), ("demo",)):
        assert options(*interactive).config.batch.target_step_ms is None


def help_of(command, monkeypatch, capsys):
    """The help of a command, without the usage lines, as {heading: text}."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        make_parser().parse_args([*command, "--help"])
    sections = capsys.readouterr().out.split("\n\n")[1:]
    return {text.partition(":\n")[0]: text for text in sections}


@pytest.mark.parametrize("command", [[], ["run-batch"], ["demo"], ["doctor"]])
def test_help_groups_the_flags(command, monkeypatch, capsys):
    found = help_of(command, monkeypatch, capsys)
    serving = {"model", "devices", "KV cache", "batching", "policy and migration", "transport"}
    assert serving <= found.keys()
    assert ("reports" in found) == (command != ["doctor"])
    assert "--model " in found["model"] and "--thrift " in found["policy and migration"]


@pytest.mark.parametrize(
    ("command", "group"), [("run-batch", "policy and migration"), ("simulate", "policies")]
)
def test_help_explains_each_policy_on_a_line_of_its_own(command, group, monkeypatch, capsys):
    assert POLICIES.keys() == policies.POLICIES.keys()
    lines = [line.strip() for line in help_of([command], monkeypatch, capsys)[group].splitlines()]
    assert all(f"{name}: {meaning}" in lines for name, meaning in POLICIES.items())
    (thrift,) = (line for line in lines if line.startswith("--thrift X"))
    assert thrift.split(maxsplit=2)[2].startswith("0 … 1: how hard to consolidate")


def test_a_key_of_a_file_may_have_underscores(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("max_num_seqs: 7\n")
    assert options("--config", str(file)).config.batch.max_num_seqs == 7
