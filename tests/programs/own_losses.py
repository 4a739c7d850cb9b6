"""Losses of a user: one that works, and each way to be wrong."""


def l1(student, teacher, temperature):
    return (student - teacher).abs().mean(dim=1) / temperature


def one_number(student, teacher, temperature):
    return l1(student, teacher, temperature).mean()


def plain(student, teacher, temperature):
    return 0.5


def infinite(student, teacher, temperature):
    return l1(student, teacher, temperature) / 0


def constant(student, teacher, temperature):
    return l1(student.detach(), teacher, temperature)


def steep(student, teacher, temperature):
    return (student - student.detach()).square().sum(dim=1).sqrt()


def broken(student, teacher, temperature):
    return student @ teacher


def two_arguments(student, teacher):
    return student.sum(dim=1)
