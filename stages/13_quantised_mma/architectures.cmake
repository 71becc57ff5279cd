# As stage 05: ptxas schedules mma.sync for each card.
set(architectures 80=80,86,89 90)
