"""An HTTP/1.1 server for one thread and many connections. It knows nothing of towns.

Start with `server`, the event loop. `http1` is the strict parser, `connection` one client's connection, `replies` the
ways to answer a request.
"""
