"""Additive methods: adapters, prompts, and vectors or networks beside the frozen layers."""

from __future__ import annotations

from .row import Row, by, later, nothing, section

NET = "its matrices are what a network of one's own makes"
LONGER = "a longer sequence: no other computation"
MADE_PROMPT = "a small network makes or picks the prompt, then a longer sequence"
KEYS = "more keys and values: the library's attention reads them (`prefix_attention`: a reference)"
ROWS = "a kernel that edits the listed rows in place"


def bottleneck(method: str, note: str, example: str | None = None, *, family: str = "B", called: str = "") -> Row:
    """A method whose computation is that of a bottleneck adapter."""
    return by(method, "bottleneck adapter", note, example=example, family=family, called=called)


ADAPTERS = section(
    "additive", "adapter",
    bottleneck("bottleneck adapter", ""),
    bottleneck("Houlsby", "behind attention and behind the feed-forward part", "double_seq_bn",
               called="adapters.double_seq_bn adapters.houlsby"),
    bottleneck("Pfeiffer", "behind the feed-forward part", "seq_bn", called="adapters.seq_bn adapters.pfeiffer"),
    bottleneck("parallel", "beside the feed-forward part, whose output is the residual", "par_bn",
               called="adapters.par_bn adapters.scaled_par_bn adapters.parallel adapters.scaled_parallel"),
    by("invertible", "invertible", "two of them, half the width each", family="B",
       called="adapters.seq_bn_inv adapters.double_seq_bn_inv adapters.pfeiffer+inv adapters.houlsby+inv"),
    bottleneck("adapter at a Linear", "the residual is the layer's output", "par_bn", family="L+phi"),
    bottleneck("LLM-Adapters", "before, behind or beside a linear layer", "par_bn", family="L+phi"),
    bottleneck("residual adapter", "behind a norm of its own", "seq_bn"),
    bottleneck("AdapterPlus", "a scale for each output", "adapterplus", called="adapters.AdapterPlusConfig"),
    bottleneck("AdaptFormer", "a parallel adapter at the feed-forward part", "par_bn"),
    bottleneck("CIAT", "parallel adapters, also at the embeddings", "par_bn"),
    later("CoDA", "B", "a parallel adapter; routing decides which tokens skip the frozen layer"),
    later("Tiny-Attn", "B", "a bottleneck with attention inside"),
    later("TSA", "B", "1 x 1 convolutions beside convolutions, as linear layers of each pixel"),
    nothing("AdapterDrop", "leaves adapters out of the first layers"),
)  # fmt: skip

MANY_TASKS = section(
    "additive",
    "multi-task adapter",
    by("AdapterFusion", "AdapterFusion", "attention over the outputs of adapters, whose keys and values need no product of"
       " their own", family="B"),
    bottleneck("AdaMix", "the one that a step has drawn, their mean afterwards", "seq_bn"),
    bottleneck("PHA", NET),
    bottleneck("Hyperformer", NET),
    nothing("AdapterSoup", "averages weights; one adapter runs"),
    nothing("MerA", "merges weights; one adapter runs"),
)  # fmt: skip

PROMPTS = section(
    "additive",
    "prompt",
    nothing("prompt tuning", LONGER, "P", "peft.PROMPT_TUNING adapters.prompt_tuning"),
    nothing("prefix tuning", KEYS, "P", "peft.PREFIX_TUNING adapters.prefix_tuning adapters.prefix_tuning_flat"),
    nothing("prefix-propagation", "prefix rows among a layer's hidden states: a longer sequence", "P"),
    nothing("P-tuning", MADE_PROMPT, "P", "peft.P_TUNING"),
    nothing("P-tuning v2", KEYS, "P"),
    nothing("APT", "prefixes with gates: " + KEYS, "P"),
    nothing("APrompt", "prompts inside attention: " + KEYS, "P"),
    nothing(
        "LLaMA-Adapter",
        "a second softmax with a gate, over few prompt tokens: the library's attention",
        "P",
        "peft.ADAPTION_PROMPT",
    ),
    nothing("Cartridge", KEYS, "P", "peft.CARTRIDGE"),
    nothing("CPT", "tokens of context as a trained prompt: a longer sequence", "P", "peft.CPT"),
    nothing("MPT", "the prompt is a shared one times a rank-one matrix", "P", "peft.MULTITASK_PROMPT_TUNING"),
    nothing("DePT", "a shorter prompt, and low-rank changes of the word embeddings", "P"),
    nothing("VPT", LONGER, "P"),
    *(nothing(name, LONGER, "P") for name in ("XPrompt", "LPT", "SPT", "SPoT", "TPT", "InfoPrompt", "PTP", "WARP")),
    *(nothing(name, MADE_PROMPT, "P") for name in ("IDPG", "IPT", "SMoP", "ATTEMPT", "Q-PEFT")),
)

OTHERS = section(
    "additive",
    "scale and others",
    by("(IA)^3", "(IA)^3", "one vector of the output, or of the input", called="peft.IA3"),
    by(
        "(IA)^3 of adapters",
        "(IA)^3",
        "AdapterHub's layers; merging there leaves the bias as it is",
        called="adapters.ia3",
    ),
    later("MoV", "L", "a scale for each token, a router's mixture of (IA)^3 vectors"),
    by("SSF", "SSF"),
    by("Hadamard adapter", "SSF", "SSF's equation, at the output of attention"),
    later("DiffFit", "L", "BitFit, trained norms and one scale for a block's output"),
    by("RoAd", "RoAd", "pairs of outputs are rotated after the GEMM", family="S", called="peft.ROAD"),
    later("PASTA", "R", "vectors added at the rows of special tokens: " + ROWS),
    nothing("LST", "a side network of ordinary layers"),
    nothing("Shadow", "a side network of ordinary layers, which corrects the input of blocks", called="peft.SHADOW"),
    nothing("IPA", "a second model changes the output's probabilities"),
    nothing("AttentionFusion", "a small attention over the outputs of layers"),
)

REFT = section(
    "additive",
    "representation",
    by("LoReFT", "LoReFT", family="R", called="pyreft.LoreftIntervention adapters.loreft"),
    by("NoReFT", "NoReFT", "any rows in place of orthonormal ones", family="R",
       called="pyreft.NoreftIntervention adapters.noreft"),
    by("DiReFT", "DiReFT", "nothing is subtracted", family="R", called="pyreft.DireftIntervention adapters.direft"),
    by("NodiReFT", "NodiReFT", "any rows, and nothing is subtracted", family="R", called="pyreft.NodireftIntervention"),
    by("ConsReFT", "ConsReFT", "a trained vector as source", family="R", called="pyreft.ConsreftIntervention"),
    by("LobiReFT", "LobiReFT", "a trained vector, and nothing is subtracted", family="R", called="pyreft.LobireftIntervention"),
)  # fmt: skip

ADDITIVE = (*ADAPTERS, *MANY_TASKS, *PROMPTS, *OTHERS, *REFT)
