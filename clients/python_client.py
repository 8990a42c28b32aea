"""A client of rpfm-edge live in one file: sends poses, receives frames, says how fast they come and how old they are.

It needs websockets, numpy and OpenCV, nothing of rpfm-edge; the messages are those of docs/live_protocol.md.

    python python_client.py ws://127.0.0.1:8787/ws poses.json --seconds 5 --out frame.png
"""

from __future__ import annotations

import argparse
import json
import struct
import threading
import time
from pathlib import Path
from ssl import SSLCertVerificationError
from typing import Any

import cv2
import numpy as np
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import connect


def now_ms() -> float:
    return time.perf_counter() * 1e3


def send_poses(socket: Any, poses: list[dict[str, Any]], fps: float, sent: dict[int, float]) -> None:
    """Send poses at a fixed rate, again from the first after the last, until the connection ends."""
    start = time.perf_counter()
    for number in range(1, 2**53):
        sent[number] = now_ms()
        message = {"v": 1, "type": "pose", "id": number, "t_ms": sent[number], **poses[number % len(poses)]}
        try:
            socket.send(json.dumps(message))
        except ConnectionClosed:
            return
        time.sleep(max(0.0, start + number / fps - time.perf_counter()))


def unpack(message: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """(header, (H, W, 3) uint8 BGR) of a frame; with the matte "stacked", (2 H, W, 3), the matte below."""
    (length,) = struct.unpack_from(">I", message)
    image = cv2.imdecode(np.frombuffer(message, np.uint8, offset=4 + length), cv2.IMREAD_COLOR)
    return json.loads(message[4 : 4 + length]), np.asarray(image)


def receive(socket: Any, end_s: float, sent: dict[int, float]) -> tuple[np.ndarray | None, list[float], int]:
    """Take and answer frames until ``end_s``: the last image, the ms from each of our poses to the image that was
    rendered of it, and how often the last image came again, because the pose had not moved."""
    image, ages, again, said = None, list[float](), 0, set[str]()
    while (left := end_s - time.perf_counter()) > 0:
        try:
            message = socket.recv(timeout=left)
        except TimeoutError:
            break
        received = now_ms()
        if isinstance(message, bytes):
            header, image = unpack(message)  # show it here
            stamps = {"id": header["id"], "frame": header["frame"], "t_ms": now_ms(), "received_ms": received}
            socket.send(json.dumps({"v": 1, "type": "shown", **stamps}))
            if "pose" not in header:  # it is of our own pose
                again += header["reused"]
                ages += [] if header["reused"] else [stamps["t_ms"] - sent[header["id"]]]
        elif (told := json.loads(message))["type"] == "error" and told["message"] not in said:
            said.add(told["message"])
            print(told["message"])
    return image, ages, again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="such as ws://127.0.0.1:8787/ws; wss:// with TLS; ?token=… where one is asked")
    parser.add_argument("poses", type=Path, help='JSON: {"keypoints": [[x, y] or null, …], "size": [H, W]}, or a list')
    parser.add_argument("--fps", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path, help="where the last frame goes")
    given = parser.parse_args()
    poses, sent = json.loads(given.poses.read_text()), dict[int, float]()
    poses = poses if isinstance(poses, list) else [poses]
    try:
        with connect(given.address, max_size=2**24, compression=None) as socket:
            socket.send(json.dumps({"v": 1, "type": "options", "source_of_poses": "client"}))  # not the server's motion
            threading.Thread(target=send_poses, args=(socket, poses, given.fps, sent), daemon=True).start()
            image, ages, again = receive(socket, time.perf_counter() + given.seconds, sent)
    except SSLCertVerificationError as error:
        raise SystemExit(f"{error.verify_message}: for one of your own, set SSL_CERT_FILE=cert.pem") from None
    except (OSError, WebSocketException) as error:  # nobody there, no token or a wrong one, too many clients
        raise SystemExit(f"no connection: {error}") from None
    if not ages and not again:
        raise SystemExit("no frame came")
    if given.out:
        cv2.imwrite(str(given.out), np.asarray(image))
    if ages:
        p50, p95 = np.percentile(ages, [50, 95])
        rate = len(ages) / given.seconds
        print(f"{rate:.1f} frames per second; from pose to image {p50:.1f} ms (p50), {p95:.1f} ms (p95)")
    if again:
        print(f"{again} times the last image again, as the pose had not moved: not counted above")


if __name__ == "__main__":
    main()
