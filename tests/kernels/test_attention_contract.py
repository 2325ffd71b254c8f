"""The XLA path, which needs no kernel, under the contract."""

from pallas_kernels.block_attention.xla import attend_xla
from tests.kernels.contract import AttentionContract


class TestXla(AttentionContract):
    @staticmethod
    def attend(q, k, v, layout):
        return attend_xla(q, [(k, v, layout)], layout)
