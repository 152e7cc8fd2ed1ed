"""The inference server: mapped weights, sessions, scheduling, HTTP on Unix sockets. It reaches no network and writes no
store; `serving.json` tells it what to serve.
"""
