"""Links of the simulated cluster: messages of one link arrive in order, those of two may not."""

import random
from dataclasses import dataclass, field

from mellmpi.protocol import Address


@dataclass
class Network:
    """Exponentially distributed delays with this mean; every link is first in, first out."""

    mean_delay_s: float
    rng: random.Random
    last: dict[tuple[Address, Address], float] = field(default_factory=dict)

    def arrival(self, src: Address, dst: Address, now: float) -> float:
        """Time at which a message sent now arrives, in seconds."""
        sent = now + self.rng.expovariate(1 / self.mean_delay_s) if self.mean_delay_s else now
        self.last[src, dst] = max(sent, self.last.get((src, dst), 0.0))
        return self.last[src, dst]
