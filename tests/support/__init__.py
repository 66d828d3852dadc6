"""What tests share: stand-ins, servers, clusters, hostile files, and programs that run as processes of their own."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
