"""Everything to know about prefopt on a CUDA machine, in one call of at most ten minutes and without a network.

    make gpu-check                                               # or: python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --parts tests steps-8b --minutes 5
    python benchmarks/gpu_check.py --tiny                        # all of it with tiny shapes: works on a CPU
    pip download --no-deps -d benchmarks/wheels pydantic pydantic-core typing-inspection annotated-types \
      trl datasets dill multiprocess                             # where they are missing: before, with a network

Correctness against the plain path first, then the tables: full steps beside TRL in real shapes with random weights,
attention backends, head variants, memory. Only torch, transformers and numpy have to be there. What else is missing is
said up front; wheels in benchmarks/wheels/ are installed into a folder of their own first, and parts that still lack
something are skipped. Every part is a process with its own limit of time, so that one that fails or hangs ends no other.
Results are written after every part to report.md, results.json and log.txt in --out ($OUT, or gpu_check/).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LEAST_SECONDS = 20.0  # a part that has less left is not started
OPTIONAL = ("pytest", "xdist", "trl", "datasets", "peft", "liger_kernel", "cut_cross_entropy", "flash_attn", "bitsandbytes")


@dataclass(frozen=True)
class Part:
    """A command with its limit in seconds. `needs`: the module of prefopt that it imports and that must be there."""

    name: str
    about: str
    limit: float
    needs: str
    command: Callable[[Context, float], list[str]]


@dataclass(frozen=True)
class Context:
    """What parts are made from. `facts`: what the probe found. `figures`: the file that a part may write its figures to."""

    tiny: bool
    trl: bool
    options: tuple[str, ...]
    facts: dict[str, Any]
    figures: Path


@dataclass(frozen=True)
class Result:
    name: str
    status: str
    seconds: float
    output: str
    figures: Any = None


def script(name: str, *words: str) -> list[str]:
    return [sys.executable, str(HERE / f"{name}.py"), *words]


def tests(context: Context, seconds: float) -> list[str]:
    words = ["-m", "pytest", str(ROOT / "tests" / "gpu"), "-q", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    together = context.facts["installed"].get("xdist") and not context.tiny
    return [sys.executable, *words, "--durations=5", "--tb=short", *(["-n", "4"] if together else [])]


def selfcheck(context: Context, seconds: float) -> list[str]:
    models = ["tiny-llama", "tiny-qwen3"] if context.tiny else ["qwen3-0.6b", "llama-3.2-1b"]
    return script("gpu_check", "--selfcheck", *models, *(["--tiny"] if context.tiny else []))


def steps(model: str, tiny: str, *, tokens: int, budget: int, lengths: tuple[str, ...], lora: bool = False) -> Any:
    """The command of full training steps of a shape beside TRL, about `tokens` unique tokens a step."""

    def command(context: Context, seconds: float) -> list[str]:
        words = ["--model", tiny if context.tiny else model, "--together", "--timeout", f"{seconds - 5:.0f}"]
        words += ["--micro-batch-tokens", str(budget), "--trl-batch", "0"]
        words += ["--step-tokens", "100", "--scale", "0.02"] if context.tiny else ["--step-tokens", str(tokens)]
        words += ["--steps", "2"] if context.tiny else ["--steps", "5", "--warm-up", "2"]
        words += ["--peak", str(context.facts["matmul"]), "--precision", context.facts["precision"]]
        words += ["--lora", "16"] if lora else []
        words += ["--lengths", *(lengths[:1] if context.tiny else lengths)]
        words += ["--trl", *(["precomputed"] if context.trl else [])]
        return script("lengths", *words, "--json", str(context.figures), "--set", *context.options)

    return command


def attention(context: Context, seconds: float) -> list[str]:
    small = ["--tokens", "200", "--scale", "0.02", "--heads", "4", "2", "16"] if context.tiny else []
    return script("attention", *small, "--json", str(context.figures))


def head(context: Context, seconds: float) -> list[str]:
    small = ["--tokens", "64", "--hidden", "64", "--vocabulary", "512", "--chunks", "14", "--repeats", "2"]
    return script("head", *(small if context.tiny else ["--chunks", "25", "27", "29"]), "--json", str(context.figures))


def memory(context: Context, seconds: float) -> list[str]:
    words = [
        "--vary",
        "vocabulary",
        "--values",
        "32768",
        "262144",
        "--rows",
        "64",
        "--budget",
        "16384",
        "--model",
        "llama-3.2-1b",
    ]
    small = ["--vary", "rows", "--values", "2", "4", "--model", "tiny-llama", "--sequence", "32", "--budget", "64"]
    return script("memory", *([*small, "--vocabulary", "512"] if context.tiny else words), "--json", str(context.figures))


SOME = ("HH-like", "prompt 2000, response 200")
MOST = (*SOME, "prompt 200, response 1000")
PARTS = (
    Part("tests", "tests/gpu: every backend against the plain forward", 170, "prefopt.pipeline", tests),
    Part("selfcheck", "prefopt's own check in real shapes, bf16", 60, "prefopt.model.selfcheck", selfcheck),
    Part(
        "steps-1b",
        "training steps, Llama-3.2-1B, all weights",
        130,
        "prefopt.pipeline",
        steps("llama-3.2-1b", "tiny-llama", tokens=32768, budget=16384, lengths=MOST),
    ),
    Part("attention", "attention backends", 60, "prefopt.model.attention", attention),
    Part("head", "head variants", 60, "prefopt.model.head", head),
    Part(
        "steps-0.6b",
        "training steps, Qwen3-0.6B, all weights",
        90,
        "prefopt.pipeline",
        steps("qwen3-0.6b", "tiny-qwen3", tokens=32768, budget=16384, lengths=SOME),
    ),
    Part(
        "steps-8b",
        "training steps, Llama-3.1-8B, LoRA of rank 16",
        120,
        "prefopt.pipeline",
        steps("llama-3.1-8b", "tiny-llama", tokens=16384, budget=4096, lora=True, lengths=SOME),
    ),
    Part("memory", "memory beyond the weights against the vocabulary", 60, "prefopt.pipeline", memory),
)


def parse() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts; what does not fit is skipped with a line")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, which a CPU computes as well")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu_check"), help="folder of the results")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of prefopt's training")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--selfcheck", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def install_wheels(folder: Path) -> str:
    """Install benchmarks/wheels/*.whl into `folder`, each without what it depends on; says what came of it."""
    wheels = sorted((HERE / "wheels").glob("*.whl"))
    if not wheels:
        return "wheels: none carried"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    pip += ["--disable-pip-version-check", "--target", str(folder)]
    if subprocess.run([*pip, *map(str, wheels)], capture_output=True).returncode == 0:
        return f"wheels: {len(wheels)} installed"
    failed = [wheel.name for wheel in wheels if subprocess.run([*pip, str(wheel)], capture_output=True).returncode]
    return f"wheels: {len(wheels) - len(failed)} of {len(wheels)} installed; not {', '.join(failed)}"


def probe() -> None:
    """In a process of its own: what is installed, which modules of prefopt can be imported, how fast the device is."""
    import torch

    from prefopt.model.precision import compute_dtype, matmul_flops, pick_device

    device = pick_device()
    dtype, _ = compute_dtype("auto", device)
    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
        "installed": {name: importlib.util.find_spec(name) is not None for name in OPTIONAL},
        "imports": {},
    }
    for part in PARTS:
        if part.needs not in facts["imports"]:
            facts["imports"][part.needs] = _import_error(part.needs)
    cuda = device.type == "cuda"
    facts["matmul"] = matmul_flops(device, dtype, size=8192 if cuda else 512, seconds=1.0 if cuda else 0.2)
    if cuda:
        facts["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
        facts["copy"] = _copy_speed(torch, device)
    print("FACTS " + json.dumps(facts))


def _import_error(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:  # a package that breaks while it is imported is as good as missing
        return " ".join([type(error).__name__, *str(error).splitlines()[:1]])
    return ""


def _copy_speed(torch: Any, device: Any) -> float:
    """Bytes read and written a second by a copy on the device."""
    first = torch.empty(2**31, dtype=torch.uint8, device=device)
    second = torch.empty_like(first)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        second.copy_(first)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * len(first) / best


def run_selfcheck(models: list[str], *, tiny: bool) -> None:
    """Print every agreement that `prefopt selfcheck` looks at; exit status 1 where one is not within its bound."""
    from shapes import PROFILES, made_pairs, random_model
    from sides import table

    from prefopt.core.progress import set_quiet
    from prefopt.model.engine import cast_parameters
    from prefopt.model.selfcheck import selfcheck

    set_quiet(True)
    rows, passed = [], True
    for name in models:
        model = random_model(name)
        cast_parameters(model.model, model.dtype)
        vocabulary = int(model.model.config.get_text_config().vocab_size)
        groups = made_pairs(PROFILES["HH-like"], 4, vocabulary, scale=0.1 if tiny else 1.0)
        for check in selfcheck(model, groups):
            passed &= check.passed
            verdict = "ok" if check.passed else "FAILED"
            rows.append([name, check.name, f"{check.deviation:.1e}", f"{check.tolerance:.1e}", verdict])
    print(table(("model", "agreement", "largest deviation", "at most", ""), rows))
    raise SystemExit(0 if passed else 1)


def run(command: list[str], limit: float, environment: dict[str, str], log: Path) -> tuple[str, str]:
    """(done, failed or stopped; output) of a command; its whole process group ends with it. Errors go to the log."""
    with tempfile.TemporaryFile("w+") as output, log.open("a") as said:
        said.write(f"\n$ {' '.join(command)}\n")
        said.flush()
        process = subprocess.Popen(command, stdout=output, stderr=said, env=environment, cwd=ROOT, start_new_session=True)
        try:
            status = "done" if process.wait(limit) == 0 else f"failed with status {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        output.seek(0)
        return status, output.read().strip()


def facts_of(environment: dict[str, str], log: Path) -> dict[str, Any]:
    status, output = run(script("gpu_check", "--probe"), 120, environment, log)
    for line in output.splitlines():
        if line.startswith("FACTS "):
            found: dict[str, Any] = json.loads(line.removeprefix("FACTS "))
            return found
    raise SystemExit(f"torch or prefopt cannot be imported here ({status}); see {log}\n{log.read_text()[-2000:]}")


def described(facts: dict[str, Any], wheels: str) -> list[str]:
    """Lines that say where this runs and what is missing."""
    lines = [f"{facts['device']}, Python {facts['python']}, torch {facts['torch']}, {facts['precision']}; {wheels}"]
    speed = f"a matrix product: {facts['matmul'] / 1e12:,.1f} TFLOP/s"
    if "copy" in facts:
        speed += f"; a copy on the device: {facts['copy'] / 1e12:.2f} TB/s; memory: {facts['memory_gib']:.0f} GiB"
    lines.append(speed)
    missing = [name for name, there in facts["installed"].items() if not there]
    lines.append(f"not installed: {', '.join(missing) or 'nothing'}")
    lines += [f"{name} cannot be imported: {error}" for name, error in facts["imports"].items() if error]
    return lines


def obstacle(part: Part, facts: dict[str, Any], seconds: float) -> str:
    """Why a part cannot start, or nothing."""
    if facts["imports"][part.needs]:
        return f"{part.needs}: {facts['imports'][part.needs]}"
    if part.name == "tests" and not facts["installed"]["pytest"]:
        return "pytest is not installed"
    return "" if seconds >= LEAST_SECONDS else f"{max(0.0, seconds):.0f} s are left"


def taken(path: Path) -> Any:
    """The figures that a part wrote, as one JSON value or one a line; the file is gone afterwards. None where there are none."""
    if not path.exists():
        return None
    text = path.read_text()
    path.unlink()
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def write(out: Path, lines: list[str], facts: dict[str, Any], results: list[Result]) -> None:
    about = {part.name: part.about for part in PARTS}
    text = ["# GPU check", "", *(f"- {line}" for line in lines)]
    for result in results:
        text += [
            "",
            f"## {about[result.name]}",
            "",
            f"{result.name}: {result.status}, {result.seconds:.0f} s",
            "",
            result.output,
        ]
    (out / "report.md").write_text("\n".join(text) + "\n")
    values = {"facts": facts, "parts": [asdict(result) for result in results]}
    (out / "results.json").write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    args = parse()
    if args.probe:
        probe()
        return
    if args.selfcheck:
        run_selfcheck(args.selfcheck, tiny=args.tiny)
    until = time.monotonic() + 60 * args.minutes
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("")
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        wheels = install_wheels(site)
        paths = [str(site), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PREFOPT_CACHE": str(Path(folder) / "cache")}
        environment = {**os.environ, **offline, **own}
        facts = facts_of(environment, log)
        lines = described(facts, wheels)
        print("\n".join(lines), flush=True)
        trl = facts["installed"]["trl"] and facts["installed"]["datasets"] and not args.no_trl
        context = Context(args.tiny, trl, tuple(args.set), facts, Path(folder) / "figures.json")
        for part in (part for part in PARTS if part.name in args.parts):
            limit = min(part.limit, until - time.monotonic())
            why = obstacle(part, facts, limit)
            started = time.monotonic()
            status, output = (f"skipped: {why}", "") if why else run(part.command(context, limit), limit, environment, log)
            results.append(Result(part.name, status, time.monotonic() - started, output, taken(context.figures)))
            write(out, lines, facts, results)
            print(f"\n== {part.name}: {part.about}: {status}, {results[-1].seconds:.0f} s\n{output}", flush=True)
    print("\n" + "\n".join(f"{result.name}: {result.status}, {result.seconds:.0f} s" for result in results))
    print(f"written to {out}")
    raise SystemExit(1 if any(result.status.startswith("failed") for result in results) else 0)


if __name__ == "__main__":
    main()
