"""Additive methods: adapters, prompts, and vectors or networks beside the frozen layers."""

from __future__ import annotations

from .row import by, later, nothing, section

BOTTLENECK = "a kernel for down, activation and up on the residual"
MADE = "a generated or averaged bottleneck, then that kernel"
LONGER = "a longer sequence: no other computation"
MADE_PROMPT = "a small network makes or picks the prompt, then a longer sequence"
KEYS = "more keys and values: the library's attention reads them"
ROWS = "a kernel that edits the listed rows in place"

ADAPTERS = section(
    "additive", "adapter",
    later("Houlsby", "B", BOTTLENECK, "adapters.double_seq_bn adapters.houlsby"),
    later("Pfeiffer", "B", BOTTLENECK, "adapters.seq_bn adapters.pfeiffer"),
    later("parallel", "B", BOTTLENECK, "adapters.par_bn adapters.scaled_par_bn adapters.parallel adapters.scaled_parallel"),
    later("invertible", "B", "two such kernels, half the width each",
          "adapters.seq_bn_inv adapters.double_seq_bn_inv adapters.pfeiffer+inv adapters.houlsby+inv"),
    later("adapter at a Linear", "L+phi", "an activation in rank space, on lora_linear's base"),
    later("LLM-Adapters", "L+phi", "an activation in rank space, on lora_linear's base"),
    later("residual adapter", "B", BOTTLENECK),
    later("AdapterPlus", "B", "the same kernel with a scale for each output", "adapters.AdapterPlusConfig"),
    later("AdaptFormer", "B", "a parallel adapter at the feed-forward part; " + BOTTLENECK),
    later("CIAT", "B", "parallel adapters, also at the embeddings; " + BOTTLENECK),
    later("CoDA", "B", "a parallel adapter; routing decides which tokens skip the frozen layer"),
    later("Tiny-Attn", "B", "a bottleneck with attention inside"),
    later("TSA", "B", "1 x 1 convolutions beside convolutions, as linear layers of each pixel"),
    nothing("AdapterDrop", "leaves adapters out of the first layers"),
)  # fmt: skip

MANY_TASKS = section(
    "additive",
    "multi-task adapter",
    later("AdapterFusion", "B", "the adapters are bottlenecks; the attention over them is the library's"),
    later("AdaMix", "B", "one of several bottlenecks in training, their mean afterwards"),
    later("PHA", "B", MADE),
    later("Hyperformer", "B", MADE),
    nothing("AdapterSoup", "averages weights; one adapter runs"),
    nothing("MerA", "merges weights; one adapter runs"),
)

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
    nothing("LLaMA-Adapter", "a gated second attention, over few prompt tokens", "P", "peft.ADAPTION_PROMPT"),
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
    later("(IA)^3 of adapters", "L", "an entry for that library's layers; the equation is (IA)^3's", "adapters.ia3"),
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
    later("LoReFT", "R", ROWS, "pyreft.LoreftIntervention adapters.loreft"),
    later("NoReFT", "R", ROWS, "pyreft.NoreftIntervention adapters.noreft"),
    later("DiReFT", "R", ROWS, "pyreft.DireftIntervention adapters.direft"),
    later("NodiReFT", "R", ROWS, "pyreft.NodireftIntervention"),
    later("ConsReFT", "R", ROWS, "pyreft.ConsreftIntervention"),
    later("LobiReFT", "R", ROWS, "pyreft.LobireftIntervention"),
)

ADDITIVE = (*ADAPTERS, *MANY_TASKS, *PROMPTS, *OTHERS, *REFT)
