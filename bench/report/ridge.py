"""The ridge sheet, docs/course/ridge.md: FLOP per byte of a decode by query rows, and of cards by their data sheets.

Cards have the peak values that NVIDIA prints, dense, for bf16 with fp32 accumulators. Only the last lines are measured: the
ceilings of the recording.
"""
from types import SimpleNamespace

HEAD_DIM_QK, HEAD_DIM_V = 576, 512
# Bytes of a cache row, and what the formats that take as many are called.
ROW_BYTES = {"16 bits": 1152, "`fp8_tile128`, `int8_tile128`": 656, "`fp8_tensor`": 576}
ROWS = [1, 8, 16, 32, 64, 128, 256, 512]
TOKENS = 4096
A100 = "NVIDIA A100 Tensor Core GPU data sheet"
ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"
# Name, TFLOP/s, GB/s, source. Sheets of L40S, H100 and H200 print the rate with sparsity as well: twice this one.
CARDS = [("A100 80 GB SXM", 312, 2039, A100), ("RTX 4090", 165.2, 1008, ADA),
         ("L40S", 362.05, 864, "NVIDIA L40S data sheet"),
         ("H100 SXM", 989.4, 3350, "NVIDIA H100 Tensor Core GPU data sheet, and architecture whitepaper"),
         ("H200 SXM", 989.4, 4800, "NVIDIA H200 Tensor Core GPU data sheet")]


def intensity(rows, row_bytes, tokens=None):
    """FLOP per byte of a sequence: `rows` query rows against one KV head. Without tokens: of an endless one, beside whose cache
    q and out do not count."""
    work = 2 * rows * (HEAD_DIM_QK + HEAD_DIM_V)
    return work / row_bytes if tokens is None else work * tokens / (row_bytes * tokens + 2 * rows * (HEAD_DIM_QK + HEAD_DIM_V))


def threshold(ridge, row_bytes):
    """The rows at which an endless sequence has as many FLOP per byte as the card."""
    return ridge * row_bytes / (2 * (HEAD_DIM_QK + HEAD_DIM_V))


def intensity_columns():
    of_format = [(f"cache in {name}" if name == "16 bits" else f"in {name}", lambda rows, width=width: f"{intensity(rows, width):.1f}")
                 for name, width in ROW_BYTES.items()]
    return [("query rows, h_q · s_q", str), *of_format,
            (f"16 bits, {TOKENS} tokens, with q and out", lambda rows: f"{intensity(rows, ROW_BYTES['16 bits'], TOKENS):.1f}")]


def cards(results):
    """Those of the data sheets, then the recorded one."""
    of_sheets = [SimpleNamespace(name=name, tflops=tflops, gbps=gbps, source=source) for name, tflops, gbps, source in CARDS]
    context = results.context
    read = float(context["ceiling_read_gbps"])
    measured = [SimpleNamespace(name=f"{context['gpu']}, measured, {how}", tflops=float(context[key]), gbps=read,
                                source=f"the recording of {context['date_utc'][:10]}: cuBLAS, and reading")
                for how, key in [("cold", "ceiling_matrix_cold_tflops"), ("sustained", "ceiling_matrix_sustained_tflops")]
                if key in context]
    return of_sheets + measured


def card_columns():
    def ridge(card):
        return card.tflops * 1000 / card.gbps
    of_format = [(f"rows, {name}", lambda card, width=width: f"{threshold(ridge(card), width):.0f}") for name, width in ROW_BYTES.items()]
    return [("card", lambda card: card.name), ("TFLOP/s", lambda card: f"{card.tflops:g}"), ("GB/s", lambda card: f"{card.gbps:g}"),
            ("ridge, FLOP per byte", lambda card: f"{ridge(card):.0f}"), *of_format, ("source", lambda card: card.source)]
