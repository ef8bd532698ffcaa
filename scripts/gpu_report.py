"""What scripts/gpu_validate.sh knows of its stages: stamps, test results as JSON, and the summary, worst rows last.

gpu_report.py stage OUTDIR NAME STATUS SECONDS KEY     records how a stage ended
gpu_report.py current OUTDIR NAME KEY                  exit status 0 if it ended well with this key
gpu_report.py tests JUNIT FILE                         pytest's results as JSON
gpu_report.py build FILE DRY                           what was built, by the doctor's JSON
gpu_report.py plan FILE OP [FILE OP ...]               what the benchmark would measure
gpu_report.py install TABLE                            puts a table of the tuner into the package
gpu_report.py summary OUTDIR DRY                       completes summary.json and prints it
"""

from __future__ import annotations

import collections
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

WORST, REASONS = 12, 15
STAGES = ("build", "tests", "tune", "bench")
NOT_RUN = "GPU tests, timing of candidates, timing against peers: no GPU, or a dry run"


def load(file: Path) -> dict:
    """The JSON of a file, empty if there is none."""
    return json.loads(file.read_text()) if file.is_file() else {}


def save(file: Path, data: dict) -> None:
    file.write_text(json.dumps(data, indent=1) + "\n")


def record(out: Path, name: str, status: int, seconds: int, key: str) -> None:
    """Keeps how a stage ended in summary.json."""
    summary = load(out / "summary.json")
    summary.setdefault("stages", {})[name] = dict(ok=status == 0, status=status, seconds=seconds, key=key)
    save(out / "summary.json", summary)


def current(out: Path, name: str, key: str) -> bool:
    """Whether a stage has ended well with this key."""
    stage = load(out / "summary.json").get("stages", {}).get(name, {})
    return bool(stage.get("ok")) and stage.get("key") == key


def built(doctor: dict, dry: bool) -> tuple[str, bool]:
    """(what was built, in words; whether that will do: a GPU machine needs CUDA kernels and a GPU)."""
    build, gpu = doctor["build"], doctor["gpu"]
    versions = ", ".join(f"{k} {v}" for k, v in doctor["versions"].items() if v)
    kernels = "with" if build["cuda_kernels"] else "without"
    text = f"{versions}\n{build['extension']}, {kernels} CUDA kernels\nGPU: {gpu['name'] if gpu else 'none'}"
    return text, dry or bool(gpu and build["cuda_kernels"])


def tests(junit: Path) -> dict:
    """Counts, failures, reasons of skips and, where a test has recorded one, its worst error over its bound."""
    counts: collections.Counter = collections.Counter()
    skips: collections.Counter = collections.Counter()
    failures, rows = [], []
    if not junit.stat().st_size:
        return lines_of_pytest(Path(f"{junit}.said"))
    for case in ElementTree.parse(junit).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        bad = [e for e in case if e.tag in ("failure", "error")]
        skipped = case.find("skipped")
        if bad:
            text = f"{bad[0].get('message') or ''}\n{bad[0].text or ''}"
            failures.append(dict(name=name, message=text.strip()[:800]))
        elif skipped is not None:
            skips[skipped.get("message") or ""] += 1
        counts["failed" if bad else "passed" if skipped is None else "skipped"] += 1
        found = {p.get("name"): p.get("value") for p in case.iter("property")}
        if "ratio" in found:
            rows.append(found | dict(ratio=None if found["ratio"] == "None" else float(found["ratio"]), test=name))
    if not counts:
        failures.append(dict(name="pytest", message="ran no test"))
    return dict(counts=dict(counts), failures=failures, skips=dict(skips.most_common()), rows=rows)


def lines_of_pytest(said: Path) -> dict:
    """What is left of a pytest that was killed: a line for every test that had ended, by itself or in one of several
    processes (``said``: its output with -v)."""
    counts: collections.Counter = collections.Counter()
    failures = []
    words = {"PASSED": "passed", "SKIPPED": "skipped", "XFAIL": "skipped", "FAILED": "failed", "ERROR": "failed"}
    for line in said.read_text().splitlines() if said.is_file() else ():
        one = re.match(r"(?:\[gw\d+\] \[ *\d+%\] )(\w+) (\S*::.*\S)|(\S*::.*\S) (\w+) +(?:\(.*\) +)?\[ *\d+%\]", line)
        if one and (word := words.get(one[1] or one[4])):
            counts[word] += 1
            if word == "failed":
                failures.append(dict(name=one[2] or one[3], message="see log"))
    failures.append(dict(name="pytest", message="was killed before it wrote its results; some test may hang"))
    return dict(counts=dict(counts), failures=failures, skips={}, rows=[])


def plan(op: str) -> dict:
    """Cases and providers of the benchmark, and why some of them cannot run here."""
    from peftkern.benchmarks.registry import OPS

    bench = OPS[op]
    cases = bench.cases("gpu", "cuda")
    if not cases:
        raise SystemExit(f"{op}: the preset gpu has no case")
    names = list(dict.fromkeys(name for case in cases for name in bench.plan(case, "gpu")))
    missing = {name: reason for name in names if (reason := bench.providers[name].missing())}
    return dict(dry_run=True, op=op, cases=[str(case) for case in cases], providers=names, missing=missing, rows=[])


def install(file: Path) -> Path:
    """Copies a table to where peftkern/dispatch/tuned.py looks for it."""
    from peftkern.dispatch import tuned
    from peftkern.settings import TABLES

    data = load(file)
    tuned.parse(data, file.name)
    target = Path(TABLES) / tuned.file_name(data["meta"]["gpu"]["name"])
    target.parent.mkdir(exist_ok=True)
    return Path(shutil.copyfile(file, target))


def accuracy_lines(data: dict) -> list[str]:
    """Tests that passed, the largest share of their bound last."""
    rows = sorted((r for r in data.get("rows", ()) if r["ratio"] is not None), key=lambda r: r["ratio"])
    return [f"{r['ratio']:6.2f} of its bound  {r['backend']} {r['dtype']} {r['problem']} {r['output']}" for r in rows]


def tune_lines(data: dict) -> list[str]:
    """Measured problems, the choice that gains least over plain torch last."""
    rows = sorted((r for r in data.get("rows", ()) if r["over_composition"]), key=lambda r: r["over_composition"])
    return [
        f"{r['over_composition']:6.3f}x addmm_  {r['op']} {r['dtype']}/{r['adapter_dtype']} {r['M']}x{r['N']}x{r['K']} "
        f"R={r['R']}{' dropout' if r['dropout'] else ''}: {r['choice']}"
        for r in rows
    ]


def bench_lines(data: dict) -> list[str]:
    """Rows of ours, the slowest beside the frozen linear last."""
    rows = [r for r in data.get("rows", ()) if r["provider"].startswith("peftkern") and r.get("ratio_to_base")]
    return [
        f"{r['ratio_to_base']:6.3f}x frozen linear  {r['provider']} {r['pass']} {r['dtype']}/{r['adapter_dtype']} "
        f"{r['M']}x{r['K']}x{r['N']} R={r['R']} dropout={r['dropout']}"
        for r in sorted(rows, key=lambda r: r["ratio_to_base"])
    ]


def limits(out: Path) -> list[str]:
    """What the package demands of itself on a GPU, what is missed last."""
    from peftkern.benchmarks.registry import OPS

    results = filter(lambda result: result.get("rows"), (load(out / file) for file in ("bench.json", "decode.json")))
    judged = [f for result in results for f in OPS[result["header"]["op"]].judge(result) if f.ok is not None]
    judged.sort(key=lambda f: not f.ok)
    return [
        f"{'kept' if f.ok else 'MISSED'}: {f.name}: {'not measured' if f.value is None else format(f.value, '.3f')} "
        f"({f.limit}{', ' if f.note else ''}{f.note})"
        for f in judged
    ]


PARTS = (
    ("tests", "tests.json", "accuracy", accuracy_lines),
    ("tune", "tune.json", "tuning", tune_lines),
    ("bench", "bench.json", "one adapter", bench_lines),
    ("bench", "decode.json", "many adapters", bench_lines),
)


def summary(out: Path, dry: bool) -> tuple[dict, list[str]]:
    """(summary.json, what is printed)."""
    found = load(out / "summary.json")
    stages = found.get("stages", {})
    lines = []
    for name, file, title, describe in PARTS:
        rows = describe(load(out / file)) if name in stages else []
        found[title] = rows[-WORST:]
        if rows:
            lines += ["", f"{title}: {len(rows)} rows, the worst last", *(f"  {line}" for line in rows[-WORST:])]
    found["limits"] = [] if dry else limits(out)
    lines += ["", *found["limits"]] if found["limits"] else []
    results = load(out / "tests.json") if "tests" in stages else {}
    found["tests"] = {k: results[k] for k in ("counts", "failures", "skips") if k in results}
    lines += ["", *(f"skipped: {n} tests: {why}" for why, n in list(results.get("skips", {}).items())[:REASONS])]
    lines += [
        f"FAILED {f['name']}: {(f['message'].splitlines() or [''])[0][:200]}" for f in results.get("failures", ())
    ]
    if results:
        lines.append("tests: " + ", ".join(f"{count} {what}" for what, count in results["counts"].items()))
    found["dry_run"], found["not_run"] = dry, NOT_RUN if dry else None
    if dry:
        lines.append(f"not run: {NOT_RUN}")
    found["ok"] = bool(stages) and all(stage["ok"] for stage in stages.values())
    for name, stage in sorted(stages.items(), key=lambda item: not item[1]["ok"]):
        how = "ok" if stage["ok"] else f"FAILED, status {stage['status']}"
        lines.append(f"{name}: {how}, {stage['seconds']} s")
    return found, lines


def main(argv: list[str]) -> int:
    """The command."""
    name, *rest = argv
    if name == "stage":
        record(Path(rest[0]), rest[1], int(rest[2]), int(rest[3]), rest[4])
    elif name == "current":
        return 0 if current(Path(rest[0]), rest[1], rest[2]) else 1
    elif name == "tests":
        found = tests(Path(rest[0]))
        collected = Path(rest[0] + ".collected")
        if collected.is_file():
            found["collected"] = int((re.findall(r"^(\d+) tests? collected", collected.read_text(), re.M) or [0])[-1])
        save(Path(rest[1]), found)
        return 1 if found["failures"] or found.get("collected") == 0 else 0
    elif name == "build":
        text, good = built(load(Path(rest[0])), rest[1] == "1")
        print(text)
        return 0 if good else 1
    elif name == "plan":
        for file, op in zip(rest[::2], rest[1::2], strict=True):
            found = plan(op)
            save(Path(file), found)
            print(f"{op}: {len(found['cases'])} cases, providers {', '.join(found['providers'])}")
            for provider, reason in found["missing"].items():
                print(f"  {provider} cannot run here: {reason}")
    elif name == "install":
        print(f"wrote {install(Path(rest[0]))}")
    elif name == "summary":
        found, lines = summary(Path(rest[0]), rest[1] == "1")
        save(Path(rest[0]) / "summary.json", found)
        print("\n".join(lines))
        return 0 if found["ok"] else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
