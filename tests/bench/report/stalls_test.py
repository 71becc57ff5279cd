"""bench/report/stalls.py: what ncu writes of the warps' states and of samples by line is read, and shown. The tables of ncu
are composed from the format of version 2025.3, not recorded."""
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "bench" / "report"))
import counters  # noqa: E402
import stalls  # noqa: E402

STATE = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
RAW = f'''==PROF== something that ncu says
"ID","Kernel Name","{STATE.format("barrier")}","{STATE.format("selected")}","gpu__time_duration.sum"
"","","inst","inst","ns"
"0","decode","3.00","1.00","1,000"
'''
HEADER = ('"Line No","Source","Address","Source","# Samples","stall_barrier","stall_long_sb","stall_selected",'
          '"stall_barrier (Not Issued)"')
# 0x10 is a wait that was inlined, 0x30 a branch in no line of the project, 0x20 in a function of it that is called from
# nowhere known.
LINES = f'''"File Path","/home/x/stages/08_seesaw/kernel.cuh"
"Function Name","void decode(int)"
{HEADER}
"1","// a kernel"
"2","  wait(a || b);  // for the other"
"","","0x10","      @!P0  BAR.SYNC.DEFER 0xa, 0x40","30","29","0","1","29"
"3","  x = 1;"
"","","0x28","      MOV R1, R2","2","0","0","2","0"
"","","0x2c","      SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R5","0","0","0","0","0"

"File Path","/home/x/stages/common/ptx/ptx.h"
"Function Name","void decode(int)"
{HEADER}
"9","  asm volatile();"
"","","0x10","      @!P0  BAR.SYNC.DEFER 0xa, 0x40","30","29","0","1","29"
"","","0x20","      LDS R1, [R2]","8","0","8","0","0"

"File Path","/usr/local/cuda/include/intrinsics.hpp"
"Function Name","void decode(int)"
{HEADER}
"151","  return;"
"","","0x30","@!P0  BRA 0x10","60","0","60","0","0"
'''


class StallsTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        for file, text in {"stages/08_seesaw/kernel.cuh": "// a kernel\n  wait(a || b);  // for the other\n  x = 1;\n",
                           "stages/common/ptx/ptx.h": "\n" * 6 + "__device__ __forceinline__ uint32_t load(int a) {\n\n  asm volatile();\n}\n"}.items():
            (self.root / file).parent.mkdir(parents=True, exist_ok=True)
            (self.root / file).write_text(text)

    def run_of(self, code=0, lines=LINES):
        calls = []
        def run(command, **_):
            calls.append(command)
            page = command[command.index("--page") + 1] if "--page" in command else ""
            return SimpleNamespace(returncode=code, stdout={"raw": RAW, "source": lines}.get(page, "said"), stderr="")
        options = SimpleNamespace(ncu="ncu", program="mla_run", root=self.root)
        return stalls.record(run, options, "08_seesaw", "h1_q1_b1_k1"), calls

    def test_states(self):
        self.assertEqual(stalls.parse_states(RAW), {"barrier": 3, "selected": 1})
        for text in [RAW.replace("issue_stalled", "issue_other"), "\n".join(RAW.splitlines()[:3])]:
            with self.assertRaisesRegex(counters.Error, "ncu wrote no states of warps"):
                stalls.parse_states(text)
        with self.assertRaisesRegex(counters.Error, "ncu wrote no table:\nERR_NVGPUCTRPERM"):
            stalls.parse_states("ERR_NVGPUCTRPERM")

    def test_an_instruction_belongs_to_the_kernels_line(self):
        found = stalls.parse_lines(LINES, "stages/08_seesaw")
        self.assertEqual(found, [("stages/08_seesaw/kernel.cuh", 3, {"selected": 2, "long_scoreboard": 60}, "SYNCS.PHASECHK"),
                                 ("stages/08_seesaw/kernel.cuh", 2, {"barrier": 29, "selected": 1}, "BAR.SYNC"),
                                 ("stages/common/ptx/ptx.h", 9, {"long_scoreboard": 8}, "LDS")])
        with self.assertRaisesRegex(counters.Error, "-lineinfo"):
            stalls.parse_lines("", "stages/08_seesaw")

    def test_recording(self):
        run, calls = self.run_of()
        self.assertEqual((run["samples"], run["states"]), (100, {"barrier": 3, "selected": 1}))
        self.assertEqual([line["text"] for line in run["lines"]], ["x = 1;", "wait(a || b);", "load()"])
        self.assertIn("decode", calls[0][calls[0].index("--kernel-name") + 1])
        with self.assertRaisesRegex(counters.Error, "ncu failed on stage 08_seesaw:\nsaid"):
            self.run_of(code=1)

    def test_tables(self):
        run, _ = self.run_of()
        _, rows = stalls.lines_table(run, least=0.2)
        self.assertEqual(rows, [["62%", "`long_scoreboard`, 97%", "`SYNCS.PHASECHK`", "`kernel.cuh`:3", "`x = 1;`"],
                                ["30%", "`barrier`, 97%", "`BAR.SYNC`", "`kernel.cuh`:2", "`wait(a \\|\\| b);`"]])
        _, rows = stalls.states_table([run, {**run, "states": {"selected": 98, "wait": 2}}])
        self.assertEqual([[row[0], *row[2:]] for row in rows],
                         [["`barrier`", "75%", "0%"], ["`selected`", "25%", "98%"], ["others", "0%", "2%"]])


if __name__ == "__main__":
    unittest.main()
