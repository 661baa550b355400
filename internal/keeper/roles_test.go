package keeper

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// The test binary is its own child: this variable says which part it plays.
const (
	envRole   = "KEEPER_TEST_ROLE" // keeper, supervisor, crash, writer
	envConfig = "KEEPER_TEST_CONFIG"
	envSocket = "KEEPER_TEST_SOCKET" // where supervisors and writers find the test
	// By default the race detector holds up every exit by a second.
	noRaceSleep = "GORACE=atexit_sleep_ms=0"
)

// Exit codes of the keeper process that only a broken keeper gives.
const (
	exitLeak   = 97 // goroutines or descriptors left after Run
	exitBroken = 98
)

func TestMain(m *testing.M) {
	switch os.Getenv(envRole) {
	case "keeper":
		os.Exit(keeperMain())
	case "supervisor":
		os.Exit(supervisorMain())
	case "crash":
		conn, err := net.Dial("unix", os.Getenv(envSocket))
		if err == nil {
			_ = conn.Close()
		}
		os.Exit(3)
	case "writer":
		os.Exit(writerMain())
	}
	os.Exit(m.Run())
}

// keeperConfig is what a test tells its keeper process.
type keeperConfig struct {
	Supervisor []string
	Role       string // of the children
	Min, Max   time.Duration
	Grace      time.Duration
	LeadWithin time.Duration
	Nofile     uint64
	deaf       bool // nobody reads the keeper's stdout and stderr
}

func keeperMain() int {
	var tc keeperConfig
	if err := json.Unmarshal([]byte(os.Getenv(envConfig)), &tc); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitBroken
	}
	if tc.Nofile > 0 {
		if err := sys.SetRlimitNofile(os.Getpid(), tc.Nofile); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return exitBroken
		}
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	before := countFDs("self")
	fd, err := sys.SealedMemfd("initial", []byte("initial"))
	if err != nil {
		return exitBroken
	}
	code, err := Run(ctx, Config{
		Supervisor: tc.Supervisor,
		Env:        []string{envRole + "=" + tc.Role, envSocket + "=" + os.Getenv(envSocket), EnvFD + "=99", noRaceSleep},
		Log:        hclog.New(&hclog.LoggerOptions{Level: hclog.Debug, Output: os.Stderr}),
		Backoff:    Backoff{Min: tc.Min, Max: tc.Max},
		Grace:      tc.Grace,
		LeadWithin: tc.LeadWithin,
		Initial:    []Entry{{Key: Key{Kind: KindBlob, Name: "initial"}, Meta: []byte("m"), FDs: []int{fd}}},
		Output:     os.Stdout,
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "run:", err)
	}
	if after := countFDs("self"); after != before {
		fmt.Fprintf(os.Stderr, "%d descriptors before Run, %d after\n", before, after)
		return exitLeak
	}
	cancel()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitLeak
	}
	return code
}

// countFDs counts a process's descriptors, without the one it takes to count,
// and without those of this process's Go poller, which exist or not.
func countFDs(pid string) int {
	dir, err := os.ReadDir("/proc/" + pid + "/fd")
	if err != nil {
		return -1
	}
	n := 0
	for _, e := range dir {
		to, err := os.Readlink("/proc/" + pid + "/fd/" + e.Name())
		if err != nil || strings.HasPrefix(to, "anon_inode:[event") {
			continue
		}
		n++
	}
	return n
}

// command is what a test asks of a supervisor or writer process.
type command struct {
	Op    string
	Kind  Kind
	From  uint64 // first id
	Count int
	FDs   int    // descriptors an entry
	Tag   string // content of the descriptors and of Meta
	Name  string
	IDs   []uint64
	Code  int
	Raw   []byte
	N     uint64
	Wait  time.Duration
}

// result of a command. Err is empty on success; Is names the sentinel error.
type response struct {
	Err, Is     string
	Pid         int
	N           int
	Incarnation uint32
	Found       []found
	Text        string
}

type found struct {
	Key  Key
	Meta string
	FDs  []string // contents
}

var sentinels = map[string]error{
	"not leader": ErrNotLeader, "led": ErrLed, "full": ErrFull, "ending": ErrEnding, "closed": ErrClosed,
	"deadline": context.DeadlineExceeded,
}

func serveCommands(handle func(command) response) int {
	conn, err := net.Dial("unix", os.Getenv(envSocket))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer conn.Close()
	dec, enc := json.NewDecoder(conn), json.NewEncoder(conn)
	if enc.Encode(response{Pid: os.Getpid()}) != nil {
		return 1
	}
	for {
		var cmd command
		if err := dec.Decode(&cmd); err != nil {
			return 0 // the test ended
		}
		if cmd.Op == "exit" {
			return cmd.Code
		}
		if err := enc.Encode(handle(cmd)); err != nil {
			return 0
		}
	}
}

// writerMain writes lines to stdout when told to.
func writerMain() int {
	return serveCommands(func(cmd command) response {
		var r response
		for i := range cmd.Count {
			n, err := fmt.Fprintf(os.Stdout, "%s %06d %s\n", cmd.Tag, i, strings.Repeat("x", int(cmd.N)))
			r.N += n
			if err != nil {
				r.Err = err.Error()
				break
			}
		}
		return r
	})
}
