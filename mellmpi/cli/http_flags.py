"""The flags of the HTTP server."""

from mellmpi.cli.flags import Flag, Group
from mellmpi.cli.values import COUNT, PORT, SECONDS, origins, switch

HTTP = Group(
    "HTTP server",
    (
        Flag("host", str, "address to listen on (default: 127.0.0.1, this machine alone)", "ADDR"),
        Flag("port", PORT, "port to listen on; 0: any that is free (default: 8000)", "N"),
        Flag("api-server-count", COUNT, "processes that speak HTTP (default: 1)", "N"),
        Flag(
            "shutdown-timeout",
            SECONDS,
            "after SIGTERM, requests in progress may end within S (default: 30)",
            "S",
        ),
        Flag(
            "api-key",
            str,
            "a key with all rights that clients send as a bearer token; may be repeated. Other "
            "users of this machine see command lines: MELLMPI_API_KEY hides it",
            "KEY",
            is_list=True,
        ),
        Flag(
            "api-key-file",
            str,
            "keys with names, scopes and limits: lines that python -m mellmpi key NAME prints. "
            "Read again when it changes",
            "FILE",
        ),
        Flag(
            "allow-unauthenticated",
            switch,
            "let everybody who reaches --host use and operate the server",
            is_switch=True,
        ),
        Flag("ssl-certfile", str, "serve HTTPS; read again when it changes", "FILE.pem"),
        Flag("ssl-keyfile", str, "private key of --ssl-certfile (default: same file)", "FILE.pem"),
        Flag(
            "allowed-origins",
            origins,
            "web pages of these origins may call the server (CORS), such as "
            "https://chat.example.org; *: all (default: none)",
            "ORIGINS",
        ),
        Flag("metrics-vllm-names", switch, "metrics under vLLM's names, too", is_switch=True),
        Flag("access-log", str, "a JSON line for each request; -: standard error", "FILE"),
        Flag(
            "batch-dir",
            str,
            "directory for files and batches of clients (/v1/files, /v1/batches); a server that "
            "is started again continues them (default: none)",
            "DIR",
        ),
    ),
)
