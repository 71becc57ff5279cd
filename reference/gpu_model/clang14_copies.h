/// @file
/// Included first where clang 14 or older instruments a kernel. They turn a copy of a struct, such as uint4, into a
/// call of memcpy, which nobody sees; newer ones call what access_hooks.cpp has. The assembler makes up for it.
#pragma once

__asm__(
    "memcpy = __tsan_memcpy\n"
    "memmove = __tsan_memmove\n"
    "memset = __tsan_memset\n");
