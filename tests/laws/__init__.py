"""The laws of the core, checked on random programs.

A law is a sentence such as "a program means the same under `nnx.jit` as run by Python". The machine makes random programs,
runs each with nnx, and compares it with what the program means. A few hundred run in the suite (`test_laws.py`);
this runs as many as wanted, prints how many ran for each law, and exits with 1 if one failed::

    python -m tests.laws --programs 100000 --seed 1
    python -m tests.laws --programs 1 --seed 57 --law 4      # one program again

What fails is made smaller first, and printed as source with what was expected and what nnx gave.

How it is built
---------------

A program is data: a prelude, which makes modules, and steps (`program.py`). Both are trees of `Line` and `Block`, so
a program prints as Python, and shrinks by dropping lines, taking blocks apart and replacing calls (`shrink.py`).

The same text runs twice. `library.py` gives it the names that it uses: once nnx's, and once plain Python's, where a Ref is an
object with a `value`, `jit` does nothing, `cond` is an `if` and `scan` a `for`, `vmap` calls the function for each lane, and `grad`
computes with dual numbers (`reference.py`). After each step everything that can be seen is written down as plain data: every
name, every object once and how it was reached, every value, every setting by its type, every attribute of a class. The two
records have to be the same.

Programs compute with `mix(a, b)`, which depends on the order of a and b and stays small; `total(tree)`, a number of
a whole tree with its sharing and settings; `bump(tree)`, which writes every Ref; and `tag(setting)`, a number for a setting
by type and value. So a wrong order, a lost alias or an old setting shows as a wrong number.

An error of nnx is right only where `Program.may` names it, with its reason; then nothing may have changed. The
generators name such an error only where a program does what cannot be expressed, and most programs must succeed.

The laws
--------

1, 2, 9. `trees.py` makes a random tree, and one check is run on it: objects, trees and modules in the place of leaves; split, merge,
clone and update, with one wrong entry; and what other libraries do (`neighbours.py`): partition and combine, masks
that are closed over, axes as a tree, leaves kept for later, a pytree that flattens a module itself, `jax.hessian`, `lower().compile()`.

3, 4. `world.py` makes modules that share Refs, arrays and each other, with cycles, lists, dicts, tuples and settings. `bodies.py` makes
statements: reads, writes, swaps, surgery. `regions.py` and `loops.py` put them into transformations of transformations: `jit`, `remat`, `checkify`,
methods, `cond`, `switch`, `scan`, `map`, `fori_loop`, `while_loop`, `vmap`, `grad`, with modules passed by position, keyword, default
and partial, carried, sliced and closed over. Between calls plain Python changes the modules. Law 4 has more loops.

5. `changes.py` makes a function, compiled or a loop or branch by itself, that finds a module by some steps (`routes.py`: a cell, a
global, an attribute of an object, its class or a base of that, a list, a dict, a default, a partial, a helper, a method), and
changes those steps between calls.

6. `changes.py` replaces settings by their twins: values that Python calls equal, listed in `things.TWINS`.

7. `failures.py` makes a function of a program of law 3 or 4 raise, while it is traced or when it runs. Nothing may have
changed, and afterwards no Ref, module, array or tracer of the program may be alive.

8. `costs.py` calls a function again and again, eager or compiled: after the third call nothing is traced, nothing is
compiled, and the number of live objects of any class does not grow.

To add to it
------------

A statement: a case in `Bodies.simple` or `Bodies.surgery`. A transformation: its meaning in `reference.py`, its name in both classes of
`library.py` and in `Library.namespace`, and a function in `regions.py` that is listed in `kinds`. A change between calls: a line in
`Routes.changes`; a way to reach a module: a method of `Routes`, listed in `_ROUTES`. A setting: a value in `TWINS`. What another library does:
a function in `neighbours.py` that returns what is wrong, or None. Where nnx may raise, say so with the reason in `may`.
"""
