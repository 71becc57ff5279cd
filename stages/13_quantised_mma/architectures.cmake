# As stage 05: ptxas schedules mma.sync for each card.
set(architectures 80-real 86-real 89-real 90)
