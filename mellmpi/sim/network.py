"""Links of the simulated cluster: ordered one by one, never against each other."""

import random
from dataclasses import dataclass, field

from mellmpi.protocol import Address


@dataclass
class Network:
    """Delays are exponential with this mean; a link never reorders what it carries."""

    mean_delay_s: float
    rng: random.Random
    last: dict[tuple[Address, Address], float] = field(default_factory=dict)

    def arrival(self, src: Address, dst: Address, now: float) -> float:
        """When a message sent now arrives."""
        sent = now + self.rng.expovariate(1 / self.mean_delay_s) if self.mean_delay_s else now
        self.last[src, dst] = max(sent, self.last.get((src, dst), 0.0))
        return self.last[src, dst]
