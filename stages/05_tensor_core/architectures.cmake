# ptxas schedules mma.sync for each card that the stage is made for, and for newer ones from PTX.
set(architectures 80=80,86,89 90)
