"""`amperage demo`: the main job end to end on this machine, with real processes, judged from outside.

Owns a temporary folder with keys, versions, releases, node directories and logs; a crash leaves that folder and, at
worst, child processes in sessions of their own, which the next line of the log names.
"""
