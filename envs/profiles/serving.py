"""What a serving engine adds to kernels that were measured alone; each has a cause outside the tables.

==================  ===================================================================================================
large all-reduces   vLLM leaves messages beyond 8 MiB to NCCL (:meth:`.KernelCosts.communication`)
``REAL_DATA``       the products were timed in bursts on uninitialised weights, at clocks that real data do not allow
``launch_us``       beyond the CUDA graphs the host launches each kernel, and the GPU waits for it
``FRONTEND_S``      HTTP, tokeniser and the way to the engine's process, for each request
==================  ===================================================================================================

A profile that :func:`.kernel_tables.build_profile` makes with a :class:`Serving` has the first three. The last, and the
step by which vLLM schedules ahead, belong to the loop around the engine (:mod:`.closed_loop`).
"""

from __future__ import annotations

from dataclasses import dataclass

REAL_DATA = 295 / 257
"""Factor on a product that is bound by compute, for real data.

aiconfigurator's collector runs its products in ``bfloat16`` and ``fp8`` six times on weights that it leaves
uninitialised (``collector/vllm/collect_gemm.py``); those in ``fp8_block`` have random ones. The ratio is the one of
zeros and normally distributed values in cuBLAS on A100, 295 and 257 TFLOPS
(https://www.thonking.ai/p/strangely-matrix-multiplications); that it holds for FP8 on H200 is an assumption.
"""

LAUNCH_US = 1400.0
"""Host's time to launch one MoE layer outside CUDA graphs: fitted by :func:`.silicon.fit_launch`.

Other figures for it: 1.0 ms a layer, the 40.6 ms of a step of 528 tokens of a model with 40 such layers where one of
496 took 16.2 ms (vLLM 0.20, ``collector/layerwise/fpm_ground_truth/SMALL_PREFILL_ENVELOPE_ROOTCAUSE.md`` of
aiconfigurator), and 0.8 ms a layer, which aiconfigurator adds to each TTFT of vLLM (``vllm_backend.py``).
"""

FRONTEND_S = 5e-3
"""Measured on vLLM's HTTP server with its CPU engine: what a TTFT has beside the steps."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How an engine serves a model.

    Attributes:
        kv: number format of the KV cache, as the tables name it: ``bfloat16`` or ``fp8``.
        moe_tables: prefix of the MoE table, where the engine's version is nearer to another one's; None: the GPU's.
        skew: a load distribution of the tables; the MoE cost is at least what they hold for it.
        launch_us: host's time to launch an MoE layer outside CUDA graphs, microseconds. Dense layers need a fifth of
            it at most (aiconfigurator measured 17.5 ms for a step of 1,024 tokens through 64 of them), less than their
            kernels: left out.
    """

    kv: str = "bfloat16"
    moe_tables: str | None = None
    skew: str | None = None
    launch_us: float = LAUNCH_US
