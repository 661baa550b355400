// Loadclient runs a fleet of TLS clients against an echo service and prints
// what they saw as JSON: one object on standard output when it is done.
//
// With -stdin it is driven by lines on standard input:
//
//	phase NAME [may-interrupt]   begin a phase
//	report                       print a report now
//	stop                         end the fleet, print the final report, exit
//
// Every report is one line then. The end of standard input is a stop.
//
// Exit codes: 0 every session lived, every byte was right and every end clean;
// 1 could not connect; 2 usage; 3 something was lost, wrong or unclean.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/load"
)

const (
	exitOK = iota
	exitConnect
	exitUsage
	exitLost
)

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

type settings struct {
	options  load.Options
	duration time.Duration
	stopWait time.Duration
	stdin    bool
	quiet    bool
}

func parse(args []string, stderr io.Writer) (*settings, error) {
	var (
		s        settings
		ca       string
		name     string
		version  string
		insecure bool
	)
	o := &s.options
	fs := flag.NewFlagSet("loadclient", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.Addr, "addr", "", "`host:port` of the echo service (needed)")
	fs.StringVar(&ca, "ca", "", "PEM `file` with the root certificates; default: the system's")
	fs.BoolVar(&insecure, "insecure", false, "do not verify the service's certificate")
	fs.StringVar(&name, "server-name", "", "name to ask for and verify; default: the host of -addr")
	fs.StringVar(&version, "tls", "", "1.2 or 1.3; default: what both have")
	fs.IntVar(&o.Sessions, "sessions", 100, "clients")
	fs.DurationVar(&o.Interval, "interval", 100*time.Millisecond, "mean time between two frames of a client")
	fs.IntVar(&o.MinPayload, "min-payload", 16, "bytes")
	fs.IntVar(&o.MaxPayload, "max-payload", 512, "bytes")
	fs.IntVar(&o.DialConcurrency, "dial-concurrency", 32, "handshakes at a time")
	fs.DurationVar(&o.StallLimit, "stall-limit", 10*time.Second, "a session without an echo for so long is lost")
	fs.Uint64Var(&o.Seed, "seed", 0, "repeatable content; 0 draws a seed")
	fs.DurationVar(&s.duration, "duration", 10*time.Second, "how long to run; 0 is until a signal or stop")
	fs.DurationVar(&s.stopWait, "stop-wait", 15*time.Second, "how long to wait for a clean end")
	fs.BoolVar(&s.stdin, "stdin", false, "take phase, report and stop from standard input; -duration is ignored")
	fs.BoolVar(&s.quiet, "quiet", false, "no progress on standard error")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if o.Addr == "" {
		return nil, errors.New("-addr is missing")
	}
	o.TLS = &tls.Config{ServerName: name, InsecureSkipVerify: insecure}
	switch version {
	case "":
	case "1.2":
		o.Version = tls.VersionTLS12
	case "1.3":
		o.Version = tls.VersionTLS13
	default:
		return nil, fmt.Errorf("-tls %q: 1.2 and 1.3 are possible", version)
	}
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("-ca: %w", err)
		}
		o.TLS.RootCAs = x509.NewCertPool()
		if !o.TLS.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("-ca: no certificate in %s", ca)
		}
	}
	return &s, nil
}

func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	s, err := parse(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return exitOK
	}
	if err != nil {
		fmt.Fprintln(stderr, "loadclient:", err)
		return exitUsage
	}
	say := func(format string, a ...any) {
		if !s.quiet {
			fmt.Fprintf(stderr, "loadclient: "+format+"\n", a...)
		}
	}
	ctx, stopSignals := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stopSignals()
	step := max(1, s.options.Sessions/10)
	s.options.Progress = func(done, total int) {
		if done%step == 0 || done == total {
			say("%d of %d connected", done, total)
		}
	}
	// A signal ends the dialling; later it asks for an orderly stop, so it
	// must not cut the running fleet off.
	fleetCtx, cutOff := context.WithCancel(context.Background())
	defer cutOff()
	dialling := context.AfterFunc(ctx, cutOff)
	f, err := load.Start(fleetCtx, s.options)
	if err != nil {
		fmt.Fprintln(stderr, "loadclient:", err)
		return exitConnect
	}
	dialling()

	if s.stdin {
		obey(ctx, f, stdin, stdout, say)
	} else {
		if s.duration > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, s.duration)
			defer cancel()
		}
		<-ctx.Done()
	}
	stopCtx, cancel := context.WithTimeout(context.Background(), s.stopWait)
	defer cancel()
	r := f.Stop(stopCtx)
	if err := print(stdout, r, !s.stdin); err != nil {
		fmt.Fprintln(stderr, "loadclient:", err)
	}
	if err := r.Err(); err != nil {
		say("%v", err)
		return exitLost
	}
	return exitOK
}

// obey does what the lines say until a stop, the end of input or a signal.
func obey(ctx context.Context, f *load.Fleet, stdin io.Reader, stdout io.Writer, say func(string, ...any)) {
	lines := make(chan string)
	go func() { // ends with the input, or with the program
		defer close(lines)
		for sc := bufio.NewScanner(stdin); sc.Scan(); {
			select {
			case lines <- sc.Text():
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return
		case line, ok := <-lines:
			if !ok {
				return
			}
			words := strings.Fields(line)
			switch {
			case len(words) == 0:
			case words[0] == "phase" && len(words) == 2:
				f.Phase(words[1], false)
			case words[0] == "phase" && len(words) == 3 && words[2] == "may-interrupt":
				f.Phase(words[1], true)
			case words[0] == "report" && len(words) == 1:
				if err := print(stdout, f.Snapshot(), false); err != nil {
					say("%v", err)
				}
			case words[0] == "stop" && len(words) == 1:
				return
			default:
				say("%q is none of: phase NAME [may-interrupt], report, stop", line)
			}
		}
	}
}

func print(w io.Writer, r load.Report, indent bool) error {
	e := json.NewEncoder(w)
	if indent {
		e.SetIndent("", "  ")
	}
	return e.Encode(r)
}
