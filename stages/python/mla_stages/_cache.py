"""A paged cache that is appended to, forked and freed. docs/paged_cache.md explains it."""
from typing import Any, Dict, Optional, Sequence, Tuple

from . import _arrays
from ._library import library, options, use_cuda


class PagedCache:
    """Pages of a latent cache, and the sequences that they hold.

    All work on one cache, the decodes that read it included, belongs on one stream, or on streams that the caller
    orders. Not thread-safe.

    :param num_pages: at least 1
    :param page_size: tokens per page: 16, 32, 64, 128 or 256
    :param dtype: of the rows that are appended, "bf16" or "fp16"
    :param cache_format: how they are kept: "16bit", "fp8_tile128", "fp8_tensor" or "int8_tile128"
    :param cache_scale: of "fp8_tensor"
    :param power_of_two: the scales of tiles are powers of two
    :param device: "cpu", "cuda" or "cuda:N"
    """

    def __init__(self, num_pages: int, *, page_size: int = 64, num_heads_kv: int = 1, dtype: str = "bf16",
                 cache_format: str = "16bit", cache_scale: float = 1.0, power_of_two: bool = False,
                 device: str = "cpu") -> None:
        place = _arrays.device_named(device)
        self._on_cuda = _arrays.is_cuda(place)
        self._need_device()
        self.cache_format = cache_format
        self.cache_scale = cache_scale
        self.page_size = page_size
        self._cache = library.cache_create(options("", 1.0, False, cache_format, float(cache_scale), 0), dtype,
                                             num_pages, page_size, num_heads_kv, power_of_two, *place)
        #: [num_pages, page_size, num_heads_kv, row]: what decode() takes as kv_cache, in place. A tvm_ffi.Tensor,
        #: which every framework takes by DLPack.
        self.data = library.cache_data(self._cache)

    def _need_device(self) -> None:
        if self._on_cuda:
            use_cuda()

    def add(self) -> int:
        """A new, empty sequence: its id, which no other will ever have."""
        return int(library.cache_add(self._cache))

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens, which shares the pages until one of the two is appended to."""
        return int(library.cache_fork(self._cache, sequence))

    def free(self, sequence: int) -> None:
        """Forgets a sequence. Pages that no other one shares are free again."""
        library.cache_free(self._cache, sequence)

    def append(self, sequences: Sequence[int], tokens: Sequence[int], rows: Any) -> None:
        """Appends tokens[i] rows to sequences[i], for all or, on an error, for none. Quantises them if need be.

        :param rows: [sum of tokens, num_heads_kv, 576], on the cache's device: those of sequences[0] first
        """
        self._need_device()
        framework = _arrays.framework_of("rows", rows)
        framework.call(rows, library.cache_append, (self._cache, list(sequences), list(tokens),
                                                    framework.view("rows", rows)))

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return int(library.cache_sequence(self._cache, sequence)[0])

    def pages(self, sequence: int) -> Tuple[int, ...]:
        """Page ids of a sequence, in order."""
        return tuple(library.cache_sequence(self._cache, sequence)[1:])

    def tables(self, sequences: Sequence[int], *, like: Any,
               max_pages_per_seq: Optional[int] = None) -> Tuple[Any, Any]:
        """What a decode of these sequences reads: block_table [batch, max_pages_per_seq] and seqlens_k [batch].

        :param like: an array whose framework and device they get: q
        :param max_pages_per_seq: by default as many as the longest needs. In a CUDA graph: always the same.
        """
        self._need_device()
        framework = _arrays.framework_of("like", like)
        _arrays.need_results("like", framework)
        if max_pages_per_seq is None:
            max_pages_per_seq = max([1] + [len(self.pages(sequence)) for sequence in sequences])
        block_table = framework.empty((len(sequences), max_pages_per_seq), "int32", like)
        seqlens_k = framework.empty((len(sequences),), "int32", like)
        framework.call(like, library.cache_write_tables,
                       (self._cache, list(sequences), _arrays.view("block_table", block_table, True),
                        _arrays.view("seqlens_k", seqlens_k, True)))
        return framework.result(block_table), framework.result(seqlens_k)

    def statistics(self) -> Dict[str, float]:
        """Pages used, shared and free, tokens, bytes, and how full the used pages are."""
        return dict(library.cache_statistics(self._cache))
