"""The API server: a child process of rank 0 that speaks HTTP.

Knows rank 0 only as the other end of a pipe of messages. Keeps nothing that rank 0 could not tell
its successor: rank 0 logs every call and its tokens.
"""
