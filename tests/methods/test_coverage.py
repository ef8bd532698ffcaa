"""The coverage table: every name has a row, and no row claims what the parity test does not show."""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys

import pytest

from peftkern.benchmarks import report
from peftkern.benchmarks.tables import methods
from peftkern.dispatch.choose import BACKENDS
from peftkern.methods import METHODS, STREAM, coverage
from peftkern.methods.coverage import COVERED, NOT_YET, NOTHING, ROWS
from peftkern.methods.coverage import main as command
from peftkern.methods.coverage.row import by, later
from peftkern.testing.residual import EXAMPLES

# The figure of the survey arXiv 2403.14608 by class, with what the other surveys and studies add.
SURVEYS = {
    "additive": """
        Houlsby, Pfeiffer, parallel, CIAT, CoDA, residual adapter, AdapterPlus, AdapterFusion, AdaMix, PHA, AdapterSoup, MerA,
        Hyperformer, AdapterDrop, Tiny-Attn, LLM-Adapters, prefix tuning, prefix-propagation, P-tuning, P-tuning v2, APT,
        prompt tuning, XPrompt, IDPG, LPT, SPT, APrompt, SPoT, TPT, InfoPrompt, PTP, IPT, SMoP, DePT, ATTEMPT, MPT, WARP,
        Q-PEFT, LLaMA-Adapter, (IA)^3, MoV, SSF, IPA, LST, PASTA, AttentionFusion, Hadamard adapter, adapter at a Linear,
        LoReFT, NoReFT, DiReFT, ConsReFT, LobiReFT, AdaptFormer, TSA, VPT, DiffFit, invertible, RoAd""",
    "selective": """
        U-Diff, S-Diff, U-BitFit, S-BitFit, BitFit, PaFi, FishMask, Fish-Dip, LT-SFT, SAM, Child-tuning, FAR, Xattn, SPT,
        threshold mask, LayerNorm, BatchNorm, linear probe, attention tuning, BEFT, SuperTuning, SHiRA""",
    "reparameterised": """
        SAID, LoRA, Compacter, KronA, KAdaptation, HiWi, VeRA, DoRA, DyLoRA, AdaLoRA, SoRA, CapaBoost, AutoLoRA, Laplace-LoRA,
        LoRA dropout, PeriodicLoRA, LoRA+, MoSLoRA, LoRAHub, MOELoRA, MoLORA, MoA, MoLE, MixLoRA, QLoRA, LoftQ, QA-LoRA,
        SV-Diff, rsLoRA, LoRA-FA, PiSSA, OLoRA, EVA, CorDA, LoRA-GA, aLoRA, Arrow, WaveFT, FourierFT, DeLoRA, OSF, GraLoRA,
        BD-LoRA, PVeRA, PSOFT, Lily, PEANuT, TinyLoRA, AdaMSS, HiRA, DEFT, FRoD, GLoRA, Uni-LoRA, VeLoRA, MonteCLoRA, MiCA,
        KaSA""",
    "hybrid": "UniPELT, S4, MAM, NOAH, AutoPEFT, LLM-Adapters, S^3PET, DLoRA",
    "unified": "AdaMix, SparseAdapter, ProPETL",
}
LIBRARIES = {
    "adapters": """
        seq_bn double_seq_bn par_bn scaled_par_bn seq_bn_inv double_seq_bn_inv compacter compacter++ prefix_tuning
        prefix_tuning_flat prompt_tuning lora ia3 mam unipelt loreft noreft direft AdapterPlusConfig""",
    "pyreft": """
        LoreftIntervention NoreftIntervention DireftIntervention NodireftIntervention ConsreftIntervention
        LobireftIntervention""",
}
CALLED = collections.Counter(name for row in ROWS for name in row.called)


@pytest.mark.parametrize("kind", SURVEYS)
def test_every_name_of_the_surveys_has_a_row(kind):
    names = [" ".join(name.split()) for name in SURVEYS[kind].split(",")]
    assert not set(names) - {row.method for row in ROWS if row.kind == kind}


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_name_of_a_library_has_one_row(library):
    names = [f"{library}.{name}" for name in LIBRARIES[library].split()]
    assert not [name for name in names if CALLED[name] != 1]


def test_every_type_of_peft_has_one_row():
    peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
    known = {name.removeprefix("peft.") for name in CALLED if name.startswith("peft.")}
    # An older release has fewer of them.
    assert {kind.value for kind in peft.PeftType} <= known | {"BONE"}
    assert all(CALLED[f"peft.{name}"] == 1 for name in known)


def test_rows_are_told_apart_and_say_something():
    assert max(collections.Counter((row.kind, row.method) for row in ROWS).values()) == 1
    for row in ROWS:
        assert row.family in ("L", "L+phi", "B", "R", "S", "P", "M") or (row.family == "" and not row.fuses), row
        assert row.by or row.note, f"{row.method}: neither who computes it nor a reason"
        assert row.example is None or row.by, row
        assert row.fuses or not row.by, f"{row.method}: nothing to fuse, and yet computed by {row.by}"


def test_every_entry_has_a_row():
    own = {row.by: row.kind for row in ROWS if row.by == row.method}
    entries = [*(m for m in METHODS.values() if m.of is None), *STREAM.values()]
    assert {entry.name: entry.taxonomy for entry in entries}.items() <= own.items()
    assert not METHODS.keys() & STREAM.keys()
    for method in METHODS.values():  # on layers of another kind it is the same row
        if method.of is not None:
            note = coverage.record(next(row for row in ROWS if row.method == method.of))["note"]
            assert method.name.removeprefix(f"{method.of} of ") in note.partition("also of ")[2].split(", ")


def test_no_row_claims_what_the_parity_test_does_not_run():
    pytest.importorskip("peft", reason="HF PEFT is not installed")
    for method in METHODS.values():
        if method.layer is None and method.of:
            continue  # a wrapper of parameters, which the integration reads: tests/integrations/hf_peft/experts
        # Without a library's layer it is the function that is compared, with the equation.
        examples = method.examples(12, 12) if method.layer else {}
        assert examples or method.function, f"{method.name}: nothing is compared"
        for row in ROWS:
            if row.by == method.name:
                assert row.example is None or row.example in examples, f"{row.method}: no example {row.example!r}"


def test_no_row_of_the_residual_stream_claims_what_its_parity_test_does_not_run():
    """tests/integrations/adapters/test_modules.py runs every form, and asks for those of the libraries that are named."""
    assert EXAMPLES.keys() == STREAM.keys()
    for entry in STREAM.values():
        forms = EXAMPLES[entry.name]
        assert {example.library for example in forms.values()} == set(entry.tested), entry.name
        for row in ROWS:
            if row.by == entry.name:
                assert row.family == entry.family or (row.family, entry.family) == ("L+phi", "B"), row
                assert row.example is None or row.example in forms, f"{row.method}: no form {row.example!r}"
                for library, _, name in (called.partition(".") for called in row.called):
                    assert library in entry.tested, f"{row.method}: not compared with {library}'s {name}"


def test_what_is_told_comes_from_the_entry():
    found = {(r["class"], r["method"]): r for r in coverage.records()}
    assert len(found) == len(ROWS)
    for record in found.values():
        told = [record[name] for name in ("op", "backends", "tested_against", "saves", "merges")]
        assert all(told) if record["status"] == COVERED else not any(told), record
    lora, entry = found["reparameterised", "rsLoRA"], next(m for m in METHODS.values() if m.name == "LoRA")
    assert (lora["by"], lora["op"], lora["saves"], lora["many_adapters"]) == ("LoRA", entry.op, entry.saves, True)
    assert lora["tested_against"].startswith("peft 0.") and lora["backends"] == list(BACKENDS)
    houlsby, reft = found["additive", "Houlsby"], found["additive", "LoReFT"]
    assert (houlsby["by"], houlsby["op"], houlsby["many_adapters"]) == (
        "bottleneck adapter",
        "bottleneck_adapter",
        True,
    )
    assert {"cpu", "triton"} <= set(houlsby["backends"]) and reft["backends"] == ["torch"]
    assert reft["tested_against"] == "adapters 1.3, pyreft 0.1" and reft["function"] == "reft"


def test_a_claim_without_its_entry_is_not_yet():
    row = by("a name", "no such entry", "a note", example="linear")
    record = coverage.record(row)
    assert record["status"] == NOT_YET and record["note"] == "an entry of the registry for no such entry; a note"
    assert (record["by"], record["op"], record["example"]) == (None, None, None)
    assert coverage.record(later("a name", "S", "work"))["note"] == "work"


def test_document_is_fresh_and_whole():
    if not report.METHODS.exists():
        pytest.skip("an installed package has no docs")
    assert report.main(["--readme", str(report.METHODS), "--check"]) == 0
    names = report.METHODS.read_text().partition("## Every name")[2].splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in names if line.startswith("| ")][1:] == [
        r.method for r in ROWS
    ]


def test_short_table_names_all_that_is_covered():
    *lines, count, _ = methods.short()
    # A method, and in brackets what else it serves.
    words = {name for line in lines[2:-1] for name in re.split(r", | \(|\)(?=,|$)", line.split(" | ")[1].strip("| "))}
    covered = [row.method for row in ROWS if coverage.status(row) == COVERED]
    assert set(covered) <= words and f"{len(ROWS)} names" in count and f" {len(covered)} covered" in count


def test_command_prints_every_row(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert command.main([]) == 0
    out = capsys.readouterr().out
    assert all(row.method in out for row in ROWS) and f"{len(ROWS)} methods: " in out
    # The last column is wrapped; the others have the room that they need.
    assert max(map(len, out.splitlines())) < 160
    assert command.main(["--status", NOTHING]) == 0
    out = capsys.readouterr().out
    assert "prompt tuning" in out and "DoRA" not in out


def test_command_gives_data_without_other_packages():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('peft', 'transformers', 'triton', 'matplotlib')));"
        "from peftkern.cli import main; sys.exit(main(['methods', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == len(ROWS)
    wanted = {"method", "class", "family", "op", "backends", "tested_against", "saves", "note"}
    assert all(wanted <= set(row) for row in rows)
