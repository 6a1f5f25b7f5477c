"""The example conversations at the start of Vicuna v0's prompts (FastChat, Apache-2.0)."""

from __future__ import annotations

from typing import Final, Literal

_Example = tuple[tuple[Literal["human"], str], tuple[Literal["gpt"], str]]

BIRTHDAY: Final[_Example] = (
    (
        "human",
        "Got any creative ideas for a 10 year old’s birthday?",
    ),
    (
        "gpt",
        "Of course! Here are some creative ideas for a 10-year-old's birthday party:\n"
        "1. Treasure Hunt: Organize a treasure hunt in your backyard or nearby park. Create clues "
        "and riddles for the kids to solve, leading them to hidden treasures and surprises.\n"
        "2. Science Party: Plan a science-themed party where kids can engage in fun and interactive "
        "experiments. You can set up different stations with activities like making slime, erupting "
        "volcanoes, or creating simple chemical reactions.\n"
        "3. Outdoor Movie Night: Set up a backyard movie night with a projector and a large screen "
        "or white sheet. Create a cozy seating area with blankets and pillows, and serve popcorn and "
        "snacks while the kids enjoy a favorite movie under the stars.\n"
        "4. DIY Crafts Party: Arrange a craft party where kids can unleash their creativity. Provide "
        "a variety of craft supplies like beads, paints, and fabrics, and let them create their own "
        "unique masterpieces to take home as party favors.\n"
        "5. Sports Olympics: Host a mini Olympics event with various sports and games. Set up "
        "different stations for activities like sack races, relay races, basketball shooting, and "
        "obstacle courses. Give out medals or certificates to the participants.\n"
        "6. Cooking Party: Have a cooking-themed party where the kids can prepare their own mini "
        "pizzas, cupcakes, or cookies. Provide toppings, frosting, and decorating supplies, and let "
        "them get hands-on in the kitchen.\n"
        "7. Superhero Training Camp: Create a superhero-themed party where the kids can engage in "
        "fun training activities. Set up an obstacle course, have them design their own superhero "
        "capes or masks, and organize superhero-themed games and challenges.\n"
        "8. Outdoor Adventure: Plan an outdoor adventure party at a local park or nature reserve. "
        "Arrange activities like hiking, nature scavenger hunts, or a picnic with games. Encourage "
        "exploration and appreciation for the outdoors.\n"
        "Remember to tailor the activities to the birthday child's interests and preferences. Have a "
        "great celebration!",
    ),
)

RENEWABLE_ENERGY: Final[_Example] = (
    (
        "human",
        "What are the key differences between renewable and non-renewable energy sources?",
    ),
    (
        "gpt",
        "Renewable energy sources are those that can be replenished naturally in a relatively short "
        "amount of time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy "
        "sources, on the other hand, are finite and will eventually be depleted, such as coal, oil, "
        "and natural gas. Here are some key differences between renewable and non-renewable energy "
        "sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
        "energy sources are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
        "than non-renewable sources, which can lead to air and water pollution, greenhouse gas "
        "emissions, and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
        "typically have lower operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
        "remote locations than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
        "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
        "non-renewable sources are not, and their depletion can lead to economic and social "
        "instability.",
    ),
)
