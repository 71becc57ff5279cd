playerDemo.list({
 "compiler": "GNU 12",
 "recordings": [
  {
   "name": "01-0",
   "stage": "01",
   "title": "01_naive, h16_q1_b1_k100, schedule 0",
   "command": "build/bench/mla_profile trace --stage 01 --shape h16_q1_b1_k100 --multiprocessors 1 --seed 3 --schedule 0 --block 0 -o mine.json"
  },
  {
   "name": "01-3",
   "stage": "01",
   "title": "01_naive, h16_q1_b1_k100, schedule 3",
   "command": "build/bench/mla_profile trace --stage 01 --shape h16_q1_b1_k100 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json"
  },
  {
   "name": "02-0",
   "stage": "02",
   "title": "02_shared_tiled, h16_q1_b1_k100, schedule 0",
   "command": "build/bench/mla_profile trace --stage 02 --shape h16_q1_b1_k100 --multiprocessors 1 --seed 3 --schedule 0 --block 0 -o mine.json"
  },
  {
   "name": "02-3",
   "stage": "02",
   "title": "02_shared_tiled, h16_q1_b1_k100, schedule 3",
   "command": "build/bench/mla_profile trace --stage 02 --shape h16_q1_b1_k100 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json"
  },
  {
   "name": "03-0",
   "stage": "03",
   "title": "03_online_softmax, h16_q1_b1_k100, schedule 0",
   "command": "build/bench/mla_profile trace --stage 03 --shape h16_q1_b1_k100 --multiprocessors 1 --seed 3 --schedule 0 --block 0 -o mine.json"
  },
  {
   "name": "03-3",
   "stage": "03",
   "title": "03_online_softmax, h16_q1_b1_k100, schedule 3",
   "command": "build/bench/mla_profile trace --stage 03 --shape h16_q1_b1_k100 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json"
  },
  {
   "name": "04-0",
   "stage": "04",
   "title": "04_split_kv, h16_q1_b1_k256, schedule 0",
   "command": "build/bench/mla_profile trace --stage 04 --shape h16_q1_b1_k256 --multiprocessors 2 --seed 3 --schedule 0 --block 0 -o mine.json"
  },
  {
   "name": "04-3",
   "stage": "04",
   "title": "04_split_kv, h16_q1_b1_k256, schedule 3",
   "command": "build/bench/mla_profile trace --stage 04 --shape h16_q1_b1_k256 --multiprocessors 2 --seed 3 --schedule 3 --block 0 -o mine.json"
  },
  {
   "name": "05-0",
   "stage": "05",
   "title": "05_tensor_core, h16_q1_b1_k300, schedule 0",
   "command": "build/bench/mla_profile trace --stage 05 --shape h16_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 0 --block 0 -o mine.json"
  },
  {
   "name": "05-3",
   "stage": "05",
   "title": "05_tensor_core, h16_q1_b1_k300, schedule 3",
   "command": "build/bench/mla_profile trace --stage 05 --shape h16_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json"
  },
  {
   "name": "06-0",
   "stage": "06",
   "title": "06_wgmma, h64_q1_b1_k300, schedule 0",
   "command": "build/bench/mla_profile trace --stage 06 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 0 --block 0 -o mine.json"
  },
  {
   "name": "06-3",
   "stage": "06",
   "title": "06_wgmma, h64_q1_b1_k300, schedule 3",
   "command": "build/bench/mla_profile trace --stage 06 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json"
  },
  {
   "name": "07-0",
   "stage": "07",
   "title": "07_tma_pipeline, h64_q1_b1_k300, schedule 0",
   "command": "build/bench/mla_profile trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 0 --block 0 -o mine.json"
  },
  {
   "name": "07-3",
   "stage": "07",
   "title": "07_tma_pipeline, h64_q1_b1_k300, schedule 3",
   "command": "build/bench/mla_profile trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json"
  },
  {
   "name": "08-0",
   "stage": "08",
   "title": "08_seesaw, h64_q1_b1_k300, schedule 0",
   "command": "build/bench/mla_profile trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 0 --block 0 -o mine.json"
  },
  {
   "name": "08-3",
   "stage": "08",
   "title": "08_seesaw, h64_q1_b1_k300, schedule 3",
   "command": "build/bench/mla_profile trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json"
  },
  {
   "name": "09-3",
   "stage": "09",
   "title": "09_one_launch, h64_q1_b1_k300, schedule 3",
   "command": "build/bench/mla_profile trace --stage 09 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json"
  },
  {
   "name": "10-3",
   "stage": "10",
   "title": "10_few_heads, h16_q1_b1_k300, schedule 3",
   "command": "build/bench/mla_profile trace --stage 10 --shape h16_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json"
  },
  {
   "name": "11-3",
   "stage": "11",
   "title": "11_cluster, h128_q1_b1_k128, schedule 3",
   "command": "build/bench/mla_profile trace --stage 11 --shape h128_q1_b1_k128 --multiprocessors 1 --seed 3 --schedule 3 --block 0 --max-events 7000 -o mine.json"
  },
  {
   "name": "12-3",
   "stage": "12",
   "title": "12_fp8, h16_q1_b1_k130_fp8_tile128, schedule 3",
   "command": "build/bench/mla_profile trace --stage 12 --shape h16_q1_b1_k130_fp8_tile128 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json"
  },
  {
   "name": "13-3",
   "stage": "13",
   "title": "13_quantised_mma, h16_q1_b1_k300_fp8_tile128, schedule 3",
   "command": "build/bench/mla_profile trace --stage 13 --shape h16_q1_b1_k300_fp8_tile128 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json"
  },
  {
   "name": "07-p-overwritten",
   "stage": "07",
   "fault": "barrier_sync removed: P of the tile before has been read",
   "title": "07_tma_pipeline, h64_q1_b1_k300, schedule 3: barrier_sync removed: P of the tile before has been read",
   "command": "MLA_MUTANT=N build/tests/mutant_run trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json",
   "change": {
    "file": "stages/07_tma_pipeline/kernel.cuh",
    "line": 353,
    "removed": "ptx::barrier_sync(kAllConsumers, kConsumers);",
    "instead": ""
   }
  },
  {
   "name": "07-no-wait",
   "stage": "07",
   "fault": "wait for empty removed",
   "title": "07_tma_pipeline, h64_q1_b1_k300, schedule 3: wait for empty removed",
   "command": "MLA_MUTANT=N build/tests/mutant_run trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json",
   "change": {
    "file": "stages/07_tma_pipeline/kernel.cuh",
    "line": 102,
    "removed": "ptx::mbarrier_wait(&smem.empty[buffer], parity);",
    "instead": ""
   }
  },
  {
   "name": "07-early-arrival-5",
   "stage": "07",
   "fault": "arrival at empty before the wait for O",
   "title": "07_tma_pipeline, h64_q1_b1_k300, schedule 5: arrival at empty before the wait for O",
   "command": "MLA_MUTANT=N build/tests/mutant_run trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 5 --block 0 -o mine.json",
   "change": {
    "file": "stages/07_tma_pipeline/kernel.cuh",
    "line": 362,
    "removed": "ptx::wgmma_wait_group<0>(o_rmem); if (lane == 0) ptx::mbarrier_arrive(&smem.empty[buffer]);",
    "instead": "if (lane == 0) ptx::mbarrier_arrive(&smem.empty[buffer]); ptx::wgmma_wait_group<0>(o_rmem);"
   }
  },
  {
   "name": "07-early-arrival-0",
   "stage": "07",
   "fault": "arrival at empty before the wait for O",
   "title": "07_tma_pipeline, h64_q1_b1_k300, schedule 0: arrival at empty before the wait for O",
   "command": "MLA_MUTANT=N build/tests/mutant_run trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 0 --block 0 -o mine.json",
   "change": {
    "file": "stages/07_tma_pipeline/kernel.cuh",
    "line": 362,
    "removed": "ptx::wgmma_wait_group<0>(o_rmem); if (lane == 0) ptx::mbarrier_arrive(&smem.empty[buffer]);",
    "instead": "if (lane == 0) ptx::mbarrier_arrive(&smem.empty[buffer]); ptx::wgmma_wait_group<0>(o_rmem);"
   }
  },
  {
   "name": "07-no-syncthreads",
   "stage": "07",
   "fault": "__syncthreads removed: the mbarriers are there",
   "title": "07_tma_pipeline, h64_q1_b1_k300, schedule 0: __syncthreads removed: the mbarriers are there",
   "command": "MLA_MUTANT=N build/tests/mutant_run trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 0 --block 0 -o mine.json",
   "change": {
    "file": "stages/07_tma_pipeline/kernel.cuh",
    "line": 80,
    "removed": "__syncthreads();",
    "instead": ""
   }
  },
  {
   "name": "08-p-not-taken",
   "stage": "08",
   "fault": "barrier_sync removed: P is taken",
   "title": "08_seesaw, h64_q1_b1_k300, schedule 3: barrier_sync removed: P is taken",
   "command": "MLA_MUTANT=N build/tests/mutant_run trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json",
   "change": {
    "file": "stages/08_seesaw/kernel.cuh",
    "line": 278,
    "removed": "ptx::barrier_sync(barrier + w, 64);",
    "instead": ""
   }
  },
  {
   "name": "08-rotary-early",
   "stage": "08",
   "fault": "rotary box released before the wait for S, first warpgroup",
   "title": "08_seesaw, h64_q1_b1_k300, schedule 3: rotary box released before the wait for S, first warpgroup",
   "command": "MLA_MUTANT=N build/tests/mutant_run trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json",
   "change": {
    "file": "stages/08_seesaw/kernel.cuh",
    "line": 410,
    "removed": "ptx::wgmma_wait_group<0>(s_rmem); release(0, kRotary);",
    "instead": "release(0, kRotary); ptx::wgmma_wait_group<0>(s_rmem);"
   }
  },
  {
   "name": "08-p-not-given",
   "stage": "08",
   "fault": "barrier_arrive removed: P is given",
   "title": "08_seesaw, h64_q1_b1_k300, schedule 3: barrier_arrive removed: P is given",
   "command": "MLA_MUTANT=N build/tests/mutant_run trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json",
   "change": {
    "file": "stages/08_seesaw/kernel.cuh",
    "line": 270,
    "removed": "ptx::barrier_arrive(barrier + w, 64);",
    "instead": ""
   }
  },
  {
   "name": "08-other-warp",
   "stage": "08",
   "fault": "named barrier of another warp: P is taken",
   "title": "08_seesaw, h64_q1_b1_k300, schedule 3: named barrier of another warp: P is taken",
   "command": "MLA_MUTANT=N build/tests/mutant_run trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json",
   "change": {
    "file": "stages/08_seesaw/kernel.cuh",
    "line": 278,
    "removed": "barrier + w",
    "instead": "barrier + (w ^ 1)"
   }
  },
  {
   "name": "08-tail",
   "stage": "08",
   "fault": "barrier_sync removed: the tail is cleared",
   "title": "08_seesaw, h64_q1_b1_k300, schedule 3: barrier_sync removed: the tail is cleared",
   "command": "MLA_MUTANT=N build/tests/mutant_run trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0 -o mine.json",
   "change": {
    "file": "stages/08_seesaw/kernel.cuh",
    "line": 315,
    "removed": "sync_warpgroup();",
    "instead": ""
   }
  }
 ],
 "stories": [
  {
   "name": "p-overwritten",
   "title": "07: P is written over before it is read",
   "left": "07-p-overwritten",
   "right": "07-3",
   "steps": [
    [
     568,
     747,
     "Warp 0 multiplies P of the first tile by V. In the picture of shared memory a line under p says that a product reads it. So far both kernels do the same."
    ],
    [
     602,
     780,
     "Left: warp 0 writes P of the second tile where that of the first was. Warp 4 needs the first one's rows, too, and has not begun its product: see its lane. Right: warp 0 waits until everyone has read P."
    ],
    [
     682,
     780,
     "Warp 4 begins its product with P of the first tile, but warp 0's rows are of the second. The race detector says which two accesses nothing orders: this product, and the store of warp 0 (its thread 0)."
    ]
   ]
  },
  {
   "name": "no-wait",
   "title": "07: the producer does not wait for an empty buffer",
   "left": "07-no-wait",
   "right": "07-3",
   "steps": [
    [
     111,
     113,
     "The producer, warp 8, has sent for two tiles of nine boxes each. Both buffers are under way: hatched."
    ],
    [
     112,
     114,
     "Left: it announces a box of the third tile at full[0], which still waits for the first tile's bytes. The phase lacks -1 arrivals, and the model stops it. Right: it waits for empty[0], which eight warps have to release."
    ]
   ]
  },
  {
   "name": "early-arrival",
   "title": "07: a buffer given back too early, under two schedules",
   "left": "07-early-arrival-5",
   "right": "07-early-arrival-0",
   "steps": [
    [
     773,
     547,
     "The same fault twice: each warp says that it has read V when it has only issued the product. What is shown is the last of the eight arrivals at empty[0]. Left the product of warp 1 is still under way. Right it is that of warp 7."
    ],
    [
     774,
     549,
     "Left: the phase is complete, the producer may go on, and does. Right: warp 7 goes on first, and its product has ended."
    ],
    [
     776,
     551,
     "Left: the copy writes what a product still reads, and that is what the model says. Right: all products have ended, and nothing would be overwritten. The race detector finds the fault all the same: nothing orders the copy after what was read."
    ]
   ]
  },
  {
   "name": "no-syncthreads",
   "title": "07: mbarriers that may not exist yet",
   "left": "07-no-syncthreads",
   "right": "07-0",
   "steps": [
    [
     3,
     3,
     "Right: warp 0 waits for everyone at __syncthreads. Left: it goes on. There is no mbarrier yet, and none is listed below the lanes. What it waits for are registers, which nobody has given up."
    ],
    [
     40,
     38,
     "Warp 8 has made the mbarriers. Left: it then gives up registers, and so lets warp 0 go on. It is luck that the one comes before the other."
    ],
    [
     137,
     47,
     "All consumers have met for Q, at a barrier that warp 8 has no part in, and are about to wait at full[0]. It does exist by now, so no schedule of the model shows anything. Only the race detector says that nothing orders the wait after the initialisation."
    ]
   ]
  },
  {
   "name": "p-not-taken",
   "title": "08: P is taken before it is there",
   "left": "08-p-not-taken",
   "right": "08-3",
   "steps": [
    [
     285,
     285,
     "Warp 3 has put its rows of P0 into p, and says so at barrier 7. Its partner is warp 7."
    ],
    [
     291,
     291,
     "Left: it reads P1 from the same place, where nobody has written P1: what it reads is its own P0. Right: it waits at barrier 11, where warp 7 will arrive."
    ],
    [
     298,
     291,
     "Left: with that it begins P1 V1_L. Boxes of V1 are still under way, hatched. Only the warps that make P1 wait for them, so P1 is the sign that they are there. The race detector names the copy."
    ]
   ]
  },
  {
   "name": "rotary-early",
   "title": "08: the rotary box given back while S reads it",
   "left": "08-rotary-early",
   "right": "08-3",
   "steps": [
    [
     398,
     398,
     "Left: warp 2 has issued S0, and gives the rotary box back at once. It is the last of four: empty[2] is complete. Right: it first waits for S0."
    ],
    [
     401,
     399,
     "Left: warp 10, the producer of rotary boxes, announces the next one at full[8], and its copy would write what S0 still reads: the line under kv. The model says so. Right: the box is given back when S0 is there."
    ]
   ]
  },
  {
   "name": "p-not-given",
   "title": "08: P is given, and nobody is told",
   "left": "08-p-not-given",
   "right": "08-3",
   "steps": [
    [
     362,
     365,
     "Left: warp 0 has put P0 and m into shared memory, and says nothing. Right: it arrives at barrier 4, and goes on."
    ],
    [
     531,
     568,
     "Warp 5 wants P0 of warp 1, at barrier 5. Left: 32 of 64 threads, and the others will never come: the table says so. Right: warp 1 has arrived, and it goes on."
    ],
    [
     533,
     568,
     "Everyone waits: warps 0 to 3 for P1, warps 4 to 7 for P0, three producers for buffers that nobody gives back. When nothing can go on, the model lists who waits where."
    ]
   ]
  },
  {
   "name": "other-warp",
   "title": "08: P is taken at another warp's barrier",
   "left": "08-other-warp",
   "right": "08-3",
   "steps": [
    [
     478,
     478,
     "Warp 4 wants P0 of warp 0, which arrives at barrier 4. Left: it waits at barrier 5, that of warp 1."
    ],
    [
     500,
     500,
     "Warp 1 has arrived there, so warp 4 goes on and reads what warp 0 wrote. It may have been written, or not: no barrier is between them. The race detector names the load and the store. Right: it waited at barrier 4."
    ]
   ]
  },
  {
   "name": "tail",
   "title": "08: multiplied before all zeros are there",
   "left": "08-tail",
   "right": "08-3",
   "steps": [
    [
     1382,
     1382,
     "300 tokens: the fifth tile ends with rows past the sequence's end, where the cache may hold NaN. The warps of a warpgroup share the work of setting them to zero. Warp 1 has done its part."
    ],
    [
     1385,
     1384,
     "Left: it multiplies at once, and reads rows that warps 0, 2 and 3 have not set to zero. Right: it waits for them."
    ],
    [
     1408,
     1384,
     "In the other warpgroup it is the same: warp 5 sets to zero what the product of warp 6 has already read. The race detector finds that pair first."
    ]
   ]
  }
 ]
});
