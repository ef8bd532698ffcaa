"""Reparameterised methods: a change of the weight in few numbers, LoRA and its kin first."""

from __future__ import annotations

from .row import by, later, section

INIT = "an initialisation; the layer is LoRA's"
OPTIMISER = "an optimiser; the layer is LoRA's"
GATE = "its gate stands where AdaLoRA's singular values do"
ROUTED = "a rank scale for each token, from a router over several adapters"
DERIVED = "an entry that makes lora_A and lora_B of its parameters"
BLOCKS = "lora_A or lora_B in blocks, without their zeros"
WEIGHT = "a change of the weight that is never stored whole"
FOLDED = "a weight that is made once a step, and one product with it"

LORA = section(
    "reparameterised", "low rank",
    by("LoRA", "LoRA", example="linear", called="peft.LORA"),
    by("rsLoRA", "LoRA", "another scaling", example="rsLoRA, no bias"),
    by("lora_bias", "LoRA", "a bias of the branch, scaled with it", example="lora_bias"),
    by("LoRA-FA", "LoRA", "lora_A is frozen, so x is not saved", example="lora_A frozen"),
    *(by(name, "LoRA", INIT, example="linear") for name in (
        "PiSSA", "OLoRA", "EVA", "CorDA", "LoRA-GA", "orthogonal initialisation",
    )),
    by("LoRA+", "LoRA", OPTIMISER, example="linear"),
    by("Riemannian LoRA", "LoRA", OPTIMISER, example="linear"),
    by("PeriodicLoRA", "LoRA", "merges and starts anew: a schedule", example="linear"),
    by("Laplace-LoRA", "LoRA", "a posterior for the weights after training", example="linear"),
    by("LoRAHub", "LoRA", "a weighted sum of adapters", example="two adapters"),
    by("MiCA", "MiCA", "lora_B is frozen"),
    by("KaSA", "KaSA", "a diagonal in rank space; the base loses its last singular values"),
    by("DoRA", "DoRA"),
    by("VeRA", "VeRA", called="peft.VERA"),
    by("PVeRA", "PVeRA", called="peft.PVERA"),
    by("DeLoRA", "DeLoRA", called="peft.DELORA"),
    by("OSF", "OSF", called="peft.OSF"),
    by("TinyLoRA", "TinyLoRA", called="peft.TINYLORA"),
    by("Uni-LoRA", "Uni-LoRA", called="peft.UNILORA"),
    by("MiSS", "MiSS", called="peft.MISS"),
    by("aLoRA", "aLoRA", "the adapter acts on the rows after its invocation"),
    by("LoRA of adapters", "LoRA", "AdapterHub's layers", example="linear", called="adapters.lora"),
    later("MoSLoRA", "L", "an (R, R) mixer, multiplied into lora_A"),
    by("PSOFT", "PSOFT", "an orthogonal (R, R), multiplied into a frozen lora_B", called="peft.PSOFT"),
    by("VB-LoRA", "VB-LoRA", called="peft.VBLORA"),
    by("RandLoRA", "RandLoRA", "the rank of the branch is the weight's", called="peft.RANDLORA"),
    by("HRA", "HRA", "reflections are a branch whose lora_B is W times a thin matrix", called="peft.HRA"),
    by("DEFT", "DEFT", "PaRa too; what is removed is W times a thin matrix", called="peft.DEFT"),
    later("MonteCLoRA", "L", DERIVED + ", the mean of samples in training"),
    later("CapaBoost", "L", DERIVED + ", one adapter under several masks"),
    later("LoRA dropout", "L", "random masks as scales of the branch's input and output"),
    later("VeLoRA", "L", "a compressed x for the gradient of lora_A"),
    by("GraLoRA", "GraLoRA", "lora_A and lora_B in blocks", called="peft.GRALORA"),
    by("BD-LoRA", "BD-LoRA", "lora_A or lora_B in blocks"),
    later("AdaMSS", "L", BLOCKS + "; the base's bias is a column of lora_A", "peft.ADAMSS"),
)  # fmt: skip

RANKS = section(
    "reparameterised",
    "dynamic rank",
    by("AdaLoRA", "AdaLoRA", "stacked with LoRA by PeftMixedModel too", called="peft.ADALORA"),
    by("DyLoRA", "AdaLoRA", "the ranks beyond the one that a step has drawn are zeros"),
    by("SoRA", "AdaLoRA", GATE),
    by("AutoLoRA", "AdaLoRA", GATE),
)

MIXTURES = section(
    "reparameterised",
    "several LoRAs",
    by("Arrow", "Arrow", "each token's best adapters by their prototypes"),
    *(later(name, "L", ROUTED) for name in ("MOELoRA", "MoLORA", "MoA", "MoLE", "MixLoRA")),
    later("X-LoRA", "L", ROUTED, "peft.XLORA"),
    later("Poly", "L", "lora_A and lora_B mixed for each sequence", "peft.POLY"),
    by("Lily", "Lily", "lora_B is a mixture by the batch's mean routing", family="S", called="peft.LILY"),
)

QUANTISED = section(
    "reparameterised",
    "quantised",
    by("QLoRA", "LoRA", "LoRA over a weight in 4 bits, which is a kind of base", example="linear"),
    later("QA-LoRA", "L", "a loader of GPTQ's weight; x is pooled in groups"),
    by("LoftQ", "LoRA", INIT + "; over a base in 4 bits as QLoRA", example="linear"),
)

OTHERS = section(
    "reparameterised", "other forms",
    by("LoHa", "LoHa", "a branch of rank R^2 of column-wise products where R is small", called="peft.LOHA"),
    by("OFT", "OFT", "blocks of x are rotated before the GEMM", family="S", called="peft.OFT"),
    by("BOFT", "BOFT", "several such rotations, permuted, and a scale of the output", family="S", called="peft.BOFT"),
    by("LoKr", "LoKr", "two small products on x as a matrix", family="S", called="peft.LOKR"),
    by("KronA", "LoKr", "both factors whole", family="S", example="both whole"),
    later("KAdaptation", "S", "a sum of Kronecker products, as for LoKr"),
    by("Compacter", "Compacter", "a bottleneck adapter of sums of Kronecker products, made once a step", family="B",
       called="adapters.compacter adapters.compacter++"),
    by("FourierFT", "FourierFT", FOLDED, family="S", called="peft.FOURIERFT"),
    by("WaveFT", "WaveFT", FOLDED, family="S", called="peft.WAVEFT"),
    by("HiRA", "HiRA", FOLDED + ", unless dropout acts", family="S", called="peft.HIRA"),
    by("GLoRA", "GLoRA", FOLDED, family="S", called="peft.GLORA"),
    by("C3A", "C3A", "circular convolutions of blocks of x", family="S", called="peft.C3A"),
    by("FRoD", "FRoD", "three products in place of the weight's, without dropout", family="S", called="peft.FROD"),
    later("SV-Diff", "S", "a scale of the weight's singular values"),
    later("SAID", "S", WEIGHT + ", of a random projection"),
    later("HiWi", "S", WEIGHT + ", of a small network on the weight"),
    by("PEANuT", "PEANuT", "a branch whose lora_A is a small network's answer to the weight", called="peft.PEANUT"),
)  # fmt: skip

REPARAMETERISED = (*LORA, *RANKS, *MIXTURES, *QUANTISED, *OTHERS)
