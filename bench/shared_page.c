/*
 * Would a shared page be faster than a socket, between a worker and keyd? No part of the product:
 * it answers that question, with messages as long as those of TLS 1.3 and an RSA-2048 key.
 *
 *     shared_page CHANNELS ROUNDS
 *
 * Two processes, each way in turn: "socket", SOCK_SEQPACKET and epoll(7), as keyd has it; "futex",
 * a page for each channel, woken by futex(2). Each client waits for its answer before it asks
 * again, the channels one after the other. What is measured:
 *
 *     trips   on channels that are open
 *     lives   a channel is made, given to the server with SCM_RIGHTS, used once and taken down, as
 *             for each connection
 *
 * The server copies a request before it looks at it: whoever shares the page can change it
 * meanwhile. A futex is nothing that epoll(7) could wait for. The server waits for up to 128 of
 * them with futex_waitv(2) (Linux 5.16); for "lives", it waits for the control socket and then for
 * the one page that has come, and so serves one channel at a time: a daemon could not do that.
 *
 * Prints a line for each: microseconds of wall time for a round, and of processor time, client and
 * server, and how often the server was switched away from.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define REQUEST_OCTETS 182 /* a header, a key's id, what a TLS 1.3 server signs */
#define ANSWER_OCTETS 258  /* a header, a signature */
#define MAX_CHANNELS 128   /* FUTEX_WAITV_MAX */
#define MASK 0x5a

struct page {
    _Atomic uint32_t asked, answered; /* how often */
    uint8_t request[REQUEST_OCTETS], answer[ANSWER_OCTETS];
};

struct way {
    const char *name;
    void (*open)(int count);
    void (*serve)(long rounds);
    void (*ask)(int channel);
    void (*serve_lives)(int control, long rounds);
    void (*live)(int control);
};

static uint8_t request[REQUEST_OCTETS], answer[ANSWER_OCTETS];
static int ours[MAX_CHANNELS], theirs[MAX_CHANNELS], channels;
static struct page *pages[MAX_CHANNELS];

static void check(int right, const char *what) {
    if (!right) {
        perror(what);
        exit(1);
    }
}

static void sign(const uint8_t *from, uint8_t *to) {
    for (int octet = 0; octet < ANSWER_OCTETS; octet++)
        to[octet] = from[octet % REQUEST_OCTETS] ^ MASK;
}

static void look_at_answer(void) {
    for (int octet = 0; octet < ANSWER_OCTETS; octet++)
        check(answer[octet] == (request[octet % REQUEST_OCTETS] ^ MASK), "another answer");
    request[0]++;
}

static void give(int control, int descriptor) {
    char space[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec one = {"", 1};
    struct msghdr message = {.msg_iov = &one, .msg_iovlen = 1, .msg_control = space,
                             .msg_controllen = sizeof space};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    *header = (struct cmsghdr){CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
    memcpy(CMSG_DATA(header), &descriptor, sizeof(int));
    check(sendmsg(control, &message, 0) == 1, "sendmsg");
}

static int take(int control) {
    char octet, space[CMSG_SPACE(sizeof(int))];
    struct iovec one = {&octet, 1};
    struct msghdr message = {.msg_iov = &one, .msg_iovlen = 1, .msg_control = space,
                             .msg_controllen = sizeof space};
    int descriptor;
    check(recvmsg(control, &message, MSG_CMSG_CLOEXEC) == 1 && CMSG_FIRSTHDR(&message), "recvmsg");
    memcpy(&descriptor, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
    return descriptor;
}

/* --- a socket for each channel ------------------------------------------------------- */

static void open_sockets(int count) {
    for (int channel = 0; channel < count; channel++) {
        int pair[2];
        check(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), "socketpair");
        ours[channel] = pair[0], theirs[channel] = pair[1];
    }
}

static void exchange(int end) {
    check(send(end, request, sizeof request, MSG_NOSIGNAL) == sizeof request, "send");
    check(recv(end, answer, sizeof answer, 0) == sizeof answer, "recv");
}

static void ask_socket(int channel) { exchange(ours[channel]); }

static void answer_socket(int end) {
    check(recv(end, request, sizeof request, 0) == sizeof request, "recv");
    sign(request, answer);
    check(send(end, answer, sizeof answer, MSG_NOSIGNAL) == sizeof answer, "send");
}

static void hear(int epoll, int descriptor) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = descriptor};
    check(!epoll_ctl(epoll, EPOLL_CTL_ADD, descriptor, &event), "epoll_ctl");
}

static int heard(int epoll) {
    struct epoll_event event;
    check(epoll_wait(epoll, &event, 1, -1) == 1, "epoll_wait");
    return event.data.fd;
}

static void serve_sockets(long rounds) {
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    for (int channel = 0; channel < channels; channel++)
        hear(epoll, theirs[channel]);
    while (rounds--)
        answer_socket(heard(epoll));
}

static void live_on_a_socket(int control) {
    int pair[2];
    check(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), "socketpair");
    give(control, pair[1]);
    close(pair[1]);
    exchange(pair[0]);
    close(pair[0]);
}

static void serve_sockets_lives(int control, long rounds) {
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    hear(epoll, control);
    for (long over = 0; over < rounds;) {
        int descriptor = heard(epoll);
        if (descriptor == control) {
            hear(epoll, take(control));
        } else if (recv(descriptor, request, sizeof request, MSG_PEEK) == 0) {
            close(descriptor);
            over++;
        } else {
            answer_socket(descriptor);
        }
    }
}

/* --- a page for each channel --------------------------------------------------------- */

static void wait_until_not(_Atomic uint32_t *word, uint32_t value) {
    while (atomic_load(word) == value)
        check(!syscall(SYS_futex, word, FUTEX_WAIT, value, NULL, NULL, 0) || errno == EAGAIN ||
                  errno == EINTR,
              "futex");
}

static void step(_Atomic uint32_t *word) {
    atomic_fetch_add(word, 1);
    syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static struct page *map(int descriptor) {
    struct page *page =
        mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    check(page != MAP_FAILED, "mmap");
    return page;
}

static int make_page(void) {
    int descriptor = memfd_create("channel", MFD_CLOEXEC);
    check(descriptor >= 0 && !ftruncate(descriptor, sizeof(struct page)), "memfd_create");
    return descriptor;
}

static void open_pages(int count) {
    for (int channel = 0; channel < count; channel++) {
        int descriptor = make_page();
        pages[channel] = map(descriptor);
        close(descriptor);
    }
}

static void ask_on(struct page *page) {
    uint32_t before = atomic_load(&page->answered);
    memcpy(page->request, request, sizeof request);
    step(&page->asked);
    wait_until_not(&page->answered, before);
    memcpy(answer, page->answer, sizeof answer);
}

static void ask_page(int channel) { ask_on(pages[channel]); }

static void answer_on(struct page *page) {
    memcpy(request, page->request, sizeof request);
    sign(request, answer);
    memcpy(page->answer, answer, sizeof answer);
    step(&page->answered);
}

static void serve_pages(long rounds) {
    struct futex_waitv words[MAX_CHANNELS];
    memset(words, 0, sizeof words);
    for (int channel = 0; channel < channels; channel++) {
        words[channel].uaddr = (uintptr_t)&pages[channel]->asked;
        words[channel].flags = FUTEX_32;
    }
    while (rounds) {
        long woken = syscall(SYS_futex_waitv, words, channels, 0, NULL, 0);
        check(woken >= 0 || errno == EAGAIN || errno == EINTR, "futex_waitv");
        /* Somebody has been woken for. Without a number, it has to be looked for. */
        for (int channel = woken < 0 ? 0 : (int)woken; channel < channels; channel++) {
            if (atomic_load(&pages[channel]->asked) != words[channel].val) {
                words[channel].val++;
                answer_on(pages[channel]);
                rounds--;
                break;
            }
        }
    }
}

static void live_on_a_page(int control) {
    int descriptor = make_page();
    give(control, descriptor);
    struct page *page = map(descriptor);
    close(descriptor);
    ask_on(page);
    munmap(page, sizeof *page);
}

static void serve_pages_lives(int control, long rounds) {
    while (rounds--) {
        int descriptor = take(control);
        struct page *page = map(descriptor);
        close(descriptor);
        wait_until_not(&page->asked, 0);
        answer_on(page);
        munmap(page, sizeof *page);
    }
}

/* --- measuring ----------------------------------------------------------------------- */

static double now(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

static void measure(const struct way *way, int lives, long rounds) {
    int control[2];
    check(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, control), "socketpair");
    if (!lives)
        way->open(channels);
    pid_t server = fork();
    check(server >= 0, "fork");
    if (!server) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(control[0]);
        if (lives)
            way->serve_lives(control[1], rounds);
        else
            way->serve(rounds);
        _exit(0);
    }
    close(control[1]);
    double wall = now(CLOCK_MONOTONIC), own = now(CLOCK_PROCESS_CPUTIME_ID);
    for (long round = 0; round < rounds; round++) {
        if (lives)
            way->live(control[0]);
        else
            way->ask((int)(round % channels));
        look_at_answer();
    }
    own = now(CLOCK_PROCESS_CPUTIME_ID) - own;
    wall = now(CLOCK_MONOTONIC) - wall;
    struct rusage used;
    int status;
    check(wait4(server, &status, 0, &used) == server && !status, "server");
    double its = (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1e6 + used.ru_utime.tv_usec +
                 used.ru_stime.tv_usec;
    printf("%-6s %s channels %3d: wall %6.1f us, processor %5.1f us (client %5.1f, server %5.1f), "
           "switches %.1f\n",
           way->name, lives ? "lives" : "trips", channels, wall / rounds, (own + its) / rounds,
           own / rounds, its / rounds, (double)(used.ru_nvcsw + used.ru_nivcsw) / rounds);
    fflush(stdout);
    close(control[0]);
}

int main(int count, char **words) {
    static const struct way ways[] = {
        {"socket", open_sockets, serve_sockets, ask_socket, serve_sockets_lives, live_on_a_socket},
        {"futex", open_pages, serve_pages, ask_page, serve_pages_lives, live_on_a_page},
    };
    long rounds = count == 3 ? atol(words[2]) : 0;
    channels = count == 3 ? atoi(words[1]) : 0;
    if (rounds < 1 || channels < 1 || channels > MAX_CHANNELS) {
        fprintf(stderr, "usage: shared_page CHANNELS ROUNDS (up to %d channels)\n", MAX_CHANNELS);
        return 2;
    }
    for (int lives = 0; lives < 2; lives++)
        for (size_t way = 0; way < sizeof ways / sizeof *ways; way++)
            measure(&ways[way], lives, rounds);
    return 0;
}
