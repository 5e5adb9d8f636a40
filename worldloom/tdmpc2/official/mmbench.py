"""The 200 tasks of MMBench; their order fixes the rows of Newt's task embedding.

Hansen et al. 2025, https://arxiv.org/abs/2511.19584; names and numbers are those of the authors' code at commit 75def92
(tdmpc2/common/__init__.py, tasks.json).
"""

from __future__ import annotations

import re

from worldloom.tdmpc2.tasks import Task

# Before each colon: action dimensions, agent steps of an episode, and the discount where it does not follow from them.
_GROUPS = """
6 500 -: walker-stand walker-walk walker-run cheetah-run
2 500 -: reacher-easy reacher-hard
1 500 -: acrobot-swingup pendulum-swingup cartpole-balance cartpole-balance-sparse cartpole-swingup
    cartpole-swingup-sparse
2 500 -: cup-catch finger-spin finger-turn-easy finger-turn-hard
5 500 -: fish-swim
4 500 -: hopper-stand hopper-hop
12 500 -: quadruped-walk quadruped-run
6 500 -: walker-walk-backward walker-run-backward cheetah-run-backward cheetah-run-front cheetah-run-back cheetah-jump
4 500 -: hopper-hop-backward
3 500 -: reacher-three-easy reacher-three-hard
2 500 -: cup-spin
1 500 -: pendulum-spin
2 500 -: jumper-jump
5 500 -: spinner-spin spinner-spin-backward spinner-jump
7 500 -: giraffe-run
4 100 -: mw-assembly mw-basketball mw-button-press-topdown mw-button-press-topdown-wall mw-button-press
    mw-button-press-wall mw-coffee-button mw-coffee-pull mw-coffee-push mw-dial-turn mw-disassemble mw-door-open
    mw-door-close mw-drawer-close mw-drawer-open mw-faucet-open mw-faucet-close mw-hammer mw-handle-press-side
    mw-handle-press mw-handle-pull-side mw-handle-pull mw-lever-pull mw-peg-insert-side mw-peg-unplug-side
    mw-pick-out-of-hole mw-pick-place mw-pick-place-wall mw-plate-slide mw-plate-slide-side mw-plate-slide-back
    mw-plate-slide-back-side mw-push-back mw-push mw-push-wall mw-reach mw-reach-wall mw-soccer mw-stick-push
    mw-stick-pull mw-sweep-into mw-sweep mw-window-open mw-window-close mw-bin-picking mw-box-close mw-door-lock
    mw-door-unlock mw-hand-insert
8 500 -: ms-ant-walk ms-ant-run
1 500 -: ms-cartpole-balance ms-cartpole-swingup
4 250 0.99: ms-hopper-stand ms-hopper-hop
4 25 -: ms-pick-cube
7 25 -: ms-pick-cube-eepose
6 25 -: ms-pick-cube-so
7 25 -: ms-poke-cube ms-push-cube ms-pull-cube
7 50 -: ms-pull-cube-tool
7 25 -: ms-stack-cube
4 25 -: ms-place-sphere
7 25 -: ms-lift-peg ms-pick-apple ms-pick-banana ms-pick-can ms-pick-hammer ms-pick-fork ms-pick-knife ms-pick-mug
    ms-pick-orange ms-pick-screwdriver ms-pick-spoon ms-pick-tennis-ball ms-pick-baseball
4 25 -: ms-pick-cube-xarm6
7 25 -: ms-pick-sponge
12 100 -: ms-anymal-reach
4 25 -: ms-reach
7 25 -: ms-reach-eepose
4 25 -: ms-reach-xarm6
1 500 -: ms-cartpole-balance-sparse ms-cartpole-swingup-sparse
8 500 0.99: mujoco-ant
6 1000 0.99: mujoco-halfcheetah
3 500 0.99: mujoco-hopper
1 500 0.99: mujoco-inverted-pendulum
2 50 -: mujoco-reacher
6 500 0.99: mujoco-walker
4 250 0.99: bipedal-walker-flat bipedal-walker-uneven bipedal-walker-rugged bipedal-walker-hills
    bipedal-walker-obstacles
2 250 0.99: lunarlander-land lunarlander-hover lunarlander-takeoff
5 100 -: rd-push-red rd-push-green rd-push-blue rd-open-slide rd-open-drawer rd-flat-block-in-bin
8 1000 0.99: og-ant
8 200 -: og-antball
2 100 -: og-point-arena og-point-maze og-point-bottleneck og-point-circle og-point-spiral
8 200 -: og-ant-arena og-ant-maze og-ant-bottleneck og-ant-circle og-ant-spiral
1 500 -: pygame-cowboy pygame-coinrun
2 500 -: pygame-spaceship
1 500 -: pygame-pong
2 500 -: pygame-bird-attack pygame-highway
2 200 -: pygame-landing
2 500 -: pygame-air-hockey pygame-rocket-collect pygame-chase-evade
1 500 -: pygame-coconut-dodge pygame-cartpole-balance pygame-cartpole-swingup pygame-cartpole-balance-sparse
    pygame-cartpole-swingup-sparse pygame-cartpole-tremor
2 200 -: pygame-point-maze-var1 pygame-point-maze-var2 pygame-point-maze-var3
3 1000 0.99: atari-alien atari-assault atari-asterix atari-atlantis atari-bank-heist atari-battle-zone atari-beamrider
    atari-boxing atari-chopper-command atari-crazy-climber atari-double-dunk atari-gopher atari-ice-hockey
    atari-jamesbond atari-kangaroo atari-krull atari-ms-pacman atari-name-this-game atari-phoenix atari-pong
    atari-road-runner atari-robotank atari-seaquest atari-space-invaders atari-tutankham atari-upndown
    atari-yars-revenge
"""


def _tasks(group: str) -> list[Task]:
    numbers, names = group.split(":")
    size, steps, discount = numbers.split()
    given = None if discount == "-" else float(discount)
    return [Task(name, int(size), int(steps), given) for name in names.split()]


MMBENCH = tuple(task for group in re.split(r"\n(?! )", _GROUPS.strip()) for task in _tasks(group))
