/* A closed-loop HTTP/1.1 load on 127.0.0.1 in one thread; benchmarks/generator.py compiles it and speaks to it.
 *
 *   loadgen -p PORT -u PATH -b BODY [-t TYPE] [-c CONNECTIONS] [-s SESSIONS] [-l LINES] [-f FIRST] [-v VOCABULARY]
 *           [-m MARK] [-e ERROR] [-g]
 *
 * Each connection sends its next request when the last one is answered; the sessions take turns on the connections.
 * BODY is said once for each of LINES sessions. In BODY and PATH stand {session}, {number}, {token} and {start}.
 * With MARK its occurrences in the answers are counted; with -g the time between reads that hold one is taken,
 * not that of a whole answer. An answer that holds ERROR, or whose status is not 200, ends the load.
 *
 * It says {"ready":true} once each connection has had an answer or a mark. Each line of its input then ends a phase:
 * it prints what was counted since the last one. At the end of its input it ends.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define READ_BYTES (1 << 18)
#define HEAD_BYTES 8192
#define CARRY 64 /* bytes kept of the last read, for a mark that came in two parts */

typedef struct {
    int fd, answered, in_body, chunked, carried, head_bytes;
    long unit, rest;
    double since;
    char head[HEAD_BYTES + 1], carry[CARRY];
} Connection;

static const char *path = "/", *body = "", *type = "application/json", *mark = NULL, *error = NULL;
static int port, connections = 1, gaps, epoll, waiting;
static long sessions, lines = 1, first, vocabulary = 1, answers, marks;
static unsigned char *seen;
static uint64_t sent;
static char *request;
static size_t request_bytes;
static float *times;
static size_t count, capacity;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static double cpu(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
}

static void fail(const char *why, const char *text, size_t bytes) {
    fprintf(stderr, "loadgen: %s: %.*s\n", why, (int)(bytes < 1500 ? bytes : 1500), text);
    exit(1);
}

static void took(double seconds) {
    if (count == capacity) {
        capacity = capacity ? 2 * capacity : 1 << 16;
        times = realloc(times, capacity * sizeof *times);
    }
    times[count++] = (float)(seconds * 1e3);
}

/* Write `text` for a session to `to`; returns where it ends. */
static char *fill(char *to, const char *text, long session) {
    while (*text) {
        if (*text == '{' && !strncmp(text, "{session}", 9)) {
            to += sprintf(to, "%08lx", (long)((uint64_t)(first + session) * 2654435761u % 4294967296u)), text += 9;
        } else if (*text == '{' && !strncmp(text, "{number}", 8)) {
            to += sprintf(to, "%ld", first + session + 1), text += 8;
        } else if (*text == '{' && !strncmp(text, "{token}", 7)) {
            to += sprintf(to, "%ld", (long)((sent + session * 31) % vocabulary)), text += 7;
        } else if (*text == '{' && !strncmp(text, "{start}", 7)) {
            to += sprintf(to, "%s", seen[session] ? "false" : "true"), text += 7;
        } else {
            *to++ = *text++;
        }
    }
    *to = 0;
    return to;
}

static void send_next(Connection *c) {
    char *at = request + HEAD_BYTES, *end = at, where[1024], head[HEAD_BYTES];
    sent++;
    for (long i = 0; i < lines; i++) {
        end = fill(end, body, c->unit * lines + i);
        if (lines > 1) *end++ = '\n';
    }
    fill(where, path, c->unit * lines);
    int bytes = snprintf(head, sizeof head,
                         "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: %s\r\nContent-Length: %ld\r\n\r\n",
                         where, port, type, (long)(end - at));
    at -= bytes;
    memcpy(at, head, bytes);
    c->head_bytes = c->in_body = c->carried = 0;
    c->since = now();
    while (at < end) {
        ssize_t wrote = send(c->fd, at, end - at, MSG_NOSIGNAL);
        if (wrote <= 0) fail("the service ended a connection", path, strlen(path));
        at += wrote;
    }
}

static void answered(Connection *c) {
    if (!c->answered) {
        c->answered = 1;
        waiting--;
    }
}

/* Times that `text` begins or ends in the new bytes from `data` on; what was carried lies before them. */
static long occurrences(const char *text, const char *data, size_t bytes, int carried) {
    size_t length = strlen(text), before = (size_t)carried < length - 1 ? (size_t)carried : length - 1;
    long found = 0;
    const char *at = data - before, *end = data + bytes;
    while ((at = memmem(at, end - at, text, length))) found++, at += length;
    return found;
}

/* Bytes of a body; returns whether it is whole. `data` has CARRY writable bytes before it. */
static int take(Connection *c, char *data, size_t bytes) {
    memcpy(data - c->carried, c->carry, c->carried);
    if (error && occurrences(error, data, bytes, c->carried)) fail("the service says", data, bytes);
    if (mark) {
        long found = occurrences(mark, data, bytes, c->carried);
        if (found) {
            marks += found;
            answered(c);
            if (gaps) {
                double t = now();
                took(t - c->since);
                c->since = t;
            }
        }
    }
    size_t kept = bytes + c->carried < CARRY ? bytes + c->carried : CARRY;
    memcpy(c->carry, data + bytes - kept, kept);
    c->carried = (int)kept;
    if (!c->chunked) return (c->rest -= (long)bytes) <= 0;
    return kept >= 5 && !memcmp(c->carry + kept - 5, "0\r\n\r\n", 5) && (kept == 5 || c->carry[kept - 6] == '\n');
}

/* Bytes of a head; returns how many of them it took. */
static size_t read_head(Connection *c, const char *data, size_t bytes) {
    size_t before = c->head_bytes, room = HEAD_BYTES - before, part = bytes < room ? bytes : room;
    memcpy(c->head + before, data, part);
    c->head[c->head_bytes = (int)(before + part)] = 0;
    char *end = strstr(c->head, "\r\n\r\n");
    if (!end) {
        if (part < bytes) fail("the head of an answer is too long", c->head, c->head_bytes);
        return bytes;
    }
    if (strncmp(c->head, "HTTP/1.1 200", 12)) fail("refused", c->head, c->head_bytes);
    char *length = strcasestr(c->head, "\r\ncontent-length:");
    c->chunked = !length || length > end;
    c->rest = c->chunked ? 0 : atol(length + 17);
    c->in_body = 1;
    return end + 4 - c->head - before;
}

static void finished(Connection *c) {
    answers++;
    answered(c);
    if (!gaps) took(now() - c->since);
    memset(seen + c->unit * lines, 1, lines);
    c->unit = (c->unit + connections) % (sessions / lines);
    send_next(c);
}

static void receive(Connection *c, char *buffer) {
    ssize_t bytes = recv(c->fd, buffer, READ_BYTES, MSG_DONTWAIT);
    if (bytes <= 0) fail("the service ended a connection", path, strlen(path));
    char *data = buffer;
    if (!c->in_body) data += read_head(c, data, bytes);
    size_t rest = bytes - (data - buffer);
    if (!c->in_body || (!rest && (c->chunked || c->rest))) return;
    if (take(c, data, rest)) finished(c);
}

static void connect_all(Connection *all) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < connections; i++) {
        Connection *c = &all[i];
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        int one = 1;
        c->fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(c->fd, (void *)&address, sizeof address)) fail("no service", "connect", 7);
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event);
        c->unit = i;
        send_next(c);
    }
}

static int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static double quantile(double q) {
    return count ? times[(size_t)((count - 1) * q)] : 0;
}

static void say(double begun, double used) {
    qsort(times, count, sizeof *times, ascending);
    printf("{\"seconds\":%.4f,\"answers\":%ld,\"marks\":%ld,\"p50_ms\":%.4f,\"p99_ms\":%.4f,\"max_ms\":%.3f,"
           "\"cpu_s\":%.4f}\n",
           now() - begun, answers, marks, quantile(.5), quantile(.99), quantile(1), cpu() - used);
    fflush(stdout);
}

static void options(int argc, char **argv) {
    int option;
    while ((option = getopt(argc, argv, "p:u:b:t:c:s:l:f:v:m:e:g")) != -1) switch (option) {
        case 'p': port = atoi(optarg); break;
        case 'u': path = optarg; break;
        case 'b': body = optarg; break;
        case 't': type = optarg; break;
        case 'c': connections = atoi(optarg); break;
        case 's': sessions = atol(optarg); break;
        case 'l': lines = atol(optarg); break;
        case 'f': first = atol(optarg); break;
        case 'v': vocabulary = atol(optarg); break;
        case 'm': mark = optarg; break;
        case 'e': error = optarg; break;
        case 'g': gaps = 1; break;
        default: exit(2);
    }
    if (sessions < connections * lines) sessions = connections * lines;
    if (sessions % lines || (mark && strlen(mark) > CARRY) || (error && strlen(error) > CARRY)) exit(2);
}

int main(int argc, char **argv) {
    options(argc, argv);
    request_bytes = HEAD_BYTES + lines * (strlen(body) + 256) + 1;
    request = malloc(request_bytes);
    seen = calloc(sessions, 1);
    char *buffer = malloc(READ_BYTES + CARRY);
    epoll = epoll_create1(0);
    struct epoll_event input = {.events = EPOLLIN, .data.ptr = NULL}, events[256];
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &input);
    waiting = connections;
    connect_all(calloc(connections, sizeof(Connection)));
    double begun = now(), used = cpu();
    for (int ready = 0;;) {
        if (!ready && !waiting) {
            ready = 1;
            puts("{\"ready\":true}");
            fflush(stdout);
        }
        int found = epoll_wait(epoll, events, 256, -1);
        for (int i = 0; i < found; i++) {
            if (events[i].data.ptr) {
                receive(events[i].data.ptr, buffer + CARRY);
                continue;
            }
            char line[256];
            if (read(0, line, sizeof line) <= 0) return 0;
            say(begun, used);
            begun = now(), used = cpu(), answers = marks = 0, count = 0;
        }
    }
}
