# wgmma exists on compute capability 9.0 alone, and only in code made for that card.
set(architectures 90a-real)
