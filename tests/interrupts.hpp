// Signals that interrupt system calls, for tests.
#ifndef VALAR_TESTS_INTERRUPTS_HPP
#define VALAR_TESTS_INTERRUPTS_HPP

#if !defined(_WIN32)
#include <signal.h>
#include <sys/time.h>

/// While it lives a signal whose handler lets no system call start again comes every millisecond.
struct Interrupts {
    Interrupts() {
        struct sigaction action = {};
        action.sa_handler = [](int) {};
        sigaction(SIGALRM, &action, &before);
        set_timer(1000);
    }
    ~Interrupts() {
        set_timer(0);
        sigaction(SIGALRM, &before, nullptr);
    }
    Interrupts(const Interrupts&) = delete;
    static void set_timer(int us) {
        const itimerval timer = {{0, us}, {0, us}};
        setitimer(ITIMER_REAL, &timer, nullptr);
    }
    struct sigaction before = {};
};
#endif

#endif
