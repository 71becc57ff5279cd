# Fewer than the stage's: cards before Hopper compile the PTX of a step when they first run it.
set(architectures 80-virtual 90-real)
