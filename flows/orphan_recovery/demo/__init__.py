"""The demo: kill real workers in mid-run before the viewer's eyes, and recover what they left.

What it can wrongly do is show what did not happen. So the workers are processes, the database and
Prefect are servers, every figure shown is read back from one of them, and each claim at the end
is checked and can fail; the demo's exit code says whether all of them held.
"""
