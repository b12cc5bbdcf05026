"""Engines elsewhere: a server that samples answers, and one that has the teacher.

client.py     requests to a server: tries, time-outs, how many at a time, and what an error says
rollouts.py   answers by token ids, sampled by a server
teacher.py    the log-probs of a teacher's most probable tokens, at given token ids
criterion.py  the divergence from a teacher that is known by those

The servers are vLLM's and SGLang's. Nothing of this is imported by a run without them.
"""
