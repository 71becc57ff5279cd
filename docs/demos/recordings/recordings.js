playerDemo.list({
 "compiler": "GNU 12",
 "recordings": [
  {
   "name": "01-0",
   "stage": "01",
   "title": "01_naive, h16_q1_b1_k100, schedule 0",
   "command": "trace --stage 01 --shape h16_q1_b1_k100 --multiprocessors 1 --seed 3 --schedule 0 --block 0"
  },
  {
   "name": "01-3",
   "stage": "01",
   "title": "01_naive, h16_q1_b1_k100, schedule 3",
   "command": "trace --stage 01 --shape h16_q1_b1_k100 --multiprocessors 1 --seed 3 --schedule 3 --block 0"
  },
  {
   "name": "02-0",
   "stage": "02",
   "title": "02_shared_tiled, h16_q1_b1_k100, schedule 0",
   "command": "trace --stage 02 --shape h16_q1_b1_k100 --multiprocessors 1 --seed 3 --schedule 0 --block 0"
  },
  {
   "name": "02-3",
   "stage": "02",
   "title": "02_shared_tiled, h16_q1_b1_k100, schedule 3",
   "command": "trace --stage 02 --shape h16_q1_b1_k100 --multiprocessors 1 --seed 3 --schedule 3 --block 0"
  },
  {
   "name": "03-0",
   "stage": "03",
   "title": "03_online_softmax, h16_q1_b1_k100, schedule 0",
   "command": "trace --stage 03 --shape h16_q1_b1_k100 --multiprocessors 1 --seed 3 --schedule 0 --block 0"
  },
  {
   "name": "03-3",
   "stage": "03",
   "title": "03_online_softmax, h16_q1_b1_k100, schedule 3",
   "command": "trace --stage 03 --shape h16_q1_b1_k100 --multiprocessors 1 --seed 3 --schedule 3 --block 0"
  },
  {
   "name": "04-0",
   "stage": "04",
   "title": "04_split_kv, h16_q1_b1_k256, schedule 0",
   "command": "trace --stage 04 --shape h16_q1_b1_k256 --multiprocessors 2 --seed 3 --schedule 0 --block 0"
  },
  {
   "name": "04-3",
   "stage": "04",
   "title": "04_split_kv, h16_q1_b1_k256, schedule 3",
   "command": "trace --stage 04 --shape h16_q1_b1_k256 --multiprocessors 2 --seed 3 --schedule 3 --block 0"
  },
  {
   "name": "05-0",
   "stage": "05",
   "title": "05_tensor_core, h16_q1_b1_k300, schedule 0",
   "command": "trace --stage 05 --shape h16_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 0 --block 0"
  },
  {
   "name": "05-3",
   "stage": "05",
   "title": "05_tensor_core, h16_q1_b1_k300, schedule 3",
   "command": "trace --stage 05 --shape h16_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0"
  },
  {
   "name": "06-0",
   "stage": "06",
   "title": "06_wgmma, h64_q1_b1_k300, schedule 0",
   "command": "trace --stage 06 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 0 --block 0"
  },
  {
   "name": "06-3",
   "stage": "06",
   "title": "06_wgmma, h64_q1_b1_k300, schedule 3",
   "command": "trace --stage 06 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0"
  },
  {
   "name": "07-0",
   "stage": "07",
   "title": "07_tma_pipeline, h64_q1_b1_k300, schedule 0",
   "command": "trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 0 --block 0"
  },
  {
   "name": "07-3",
   "stage": "07",
   "title": "07_tma_pipeline, h64_q1_b1_k300, schedule 3",
   "command": "trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0"
  },
  {
   "name": "08-0",
   "stage": "08",
   "title": "08_seesaw, h64_q1_b1_k300, schedule 0",
   "command": "trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 0 --block 0"
  },
  {
   "name": "08-3",
   "stage": "08",
   "title": "08_seesaw, h64_q1_b1_k300, schedule 3",
   "command": "trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0"
  },
  {
   "name": "09-3",
   "stage": "09",
   "title": "09_one_launch, h64_q1_b1_k300, schedule 3",
   "command": "trace --stage 09 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0"
  },
  {
   "name": "10-3",
   "stage": "10",
   "title": "10_few_heads, h16_q1_b1_k300, schedule 3",
   "command": "trace --stage 10 --shape h16_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0"
  },
  {
   "name": "11-3",
   "stage": "11",
   "title": "11_cluster, h128_q1_b1_k128, schedule 3",
   "command": "trace --stage 11 --shape h128_q1_b1_k128 --multiprocessors 1 --seed 3 --schedule 3 --block 0 --max-events 7000"
  },
  {
   "name": "12-3",
   "stage": "12",
   "title": "12_fp8, h16_q1_b1_k130_fp8_tile128, schedule 3",
   "command": "trace --stage 12 --shape h16_q1_b1_k130_fp8_tile128 --multiprocessors 1 --seed 3 --schedule 3 --block 0"
  },
  {
   "name": "13-3",
   "stage": "13",
   "title": "13_quantised_mma, h16_q1_b1_k300_fp8_tile128, schedule 3",
   "command": "trace --stage 13 --shape h16_q1_b1_k300_fp8_tile128 --multiprocessors 1 --seed 3 --schedule 3 --block 0"
  },
  {
   "name": "07-p-overwritten",
   "stage": "07",
   "fault": "barrier_sync removed: P of the tile before has been read",
   "title": "07_tma_pipeline, h64_q1_b1_k300, schedule 3: barrier_sync removed: P of the tile before has been read",
   "command": "trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0",
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
   "command": "trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0",
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
   "command": "trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 5 --block 0",
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
   "command": "trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 0 --block 0",
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
   "command": "trace --stage 07 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 0 --block 0",
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
   "command": "trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0",
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
   "command": "trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0",
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
   "command": "trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0",
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
   "command": "trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0",
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
   "command": "trace --stage 08 --shape h64_q1_b1_k300 --multiprocessors 1 --seed 3 --schedule 3 --block 0",
   "change": {
    "file": "stages/08_seesaw/kernel.cuh",
    "line": 315,
    "removed": "sync_warpgroup();",
    "instead": ""
   }
  }
 ],
 "stories": []
});
