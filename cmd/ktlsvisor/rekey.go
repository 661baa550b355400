package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

func (a *app) rekeyCommand() *cobra.Command {
	var (
		req    admin.RekeyRequest
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "rekey [SESSION...]",
		Short: "Change the keys of live sessions",
		Long: `Change the key under which records are sent to the client (a KeyUpdate of TLS 1.3), in
the named sessions, in those of a pool, or in all. With --request the client is asked
to change its key, too. Blocks until that is done. Data goes on flowing.

Sessions do so by themselves before a key has been used for too much.

Exit code 0: every session that can change its keys has; 1: refused, or no ktlsvisor
runs there; 2: the command line is wrong; 4: some sessions could not now, because they
are on the way to another worker, or their client does not read. Sessions that can
never (TLS 1.2; the kernel layer before Linux 6.14) are listed and change nothing in
the exit code.`,
		Example: `  ktlsvisor rekey
  ktlsvisor rekey --pool chat --request
  ktlsvisor rekey s12 s34 --json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Sessions = args
			switch {
			case req.Wait <= 0:
				return usagef("--wait %s is not positive", req.Wait)
			case req.Pool == "" && cmd.Flags().Changed("pool"):
				return usagef("the pool's name is empty")
			case req.Pool != "" && len(args) > 0:
				return usagef("give sessions or --pool, not both")
			case len(args) > admin.MaxRekeySessions:
				return usagef("%d sessions are too many to name, the limit is %d; use --pool, or name none for all", len(args), admin.MaxRekeySessions)
			}
			for _, s := range args {
				if _, err := admin.ParseSessionID(s); err != nil {
					return usagef("%q is no session; they are called s1, s2, …, see \"ktlsvisor sessions\"", s)
				}
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return a.rekey(ctx, req, asJSON)
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Pool, "pool", "", "all sessions of this pool")
	f.BoolVar(&req.RequestPeer, "request", false, "ask the clients to change their keys, too")
	f.DurationVar(&req.Wait, "wait", defaultWait, "how long all of it may take; more than 0")
	f.BoolVar(&asJSON, "json", false, "answer in JSON")
	return cmd
}

func (a *app) rekey(ctx context.Context, req admin.RekeyRequest, asJSON bool) error {
	p := newProgress(a.err)
	rep, err := a.client().Rekey(ctx, req, p.show)
	p.end()
	if err != nil {
		code := exitFailed
		switch {
		case ctx.Err() != nil:
			code = exitSignal
			fmt.Fprintln(a.err, "What was begun goes on in the supervisor.")
		case errors.Is(err, admin.ErrInterrupted):
			fmt.Fprintln(a.err, "The supervisor was restarted; no session is lost. Sessions whose keys had not changed keep them: ask again.")
		}
		return a.noReport(err, asJSON, admin.RekeyReport{Outcome: admin.Outcome(code), Error: err.Error()}, code)
	}
	return answer(a, asJSON, rep, printRekey, rep.Outcome)
}

func printRekey(w io.Writer, rep *admin.RekeyReport) {
	rows := [][]string{{"RESULT", "SESSIONS", "WHY", "WHICH"}, {"changed", strconv.Itoa(rep.Updated), "-", "-"}}
	rows = append(rows, rekeyRows("not now", rep.Failed, rep.FailedCount)...)
	rows = append(rows, rekeyRows("cannot", rep.Unsupported, rep.UnsupportedCount)...)
	if rep.Ended > 0 {
		rows = append(rows, []string{"ended", strconv.Itoa(rep.Ended), "-", "-"})
	}
	table(w, rows)
	text := "Every session that can change its keys has."
	if rep.FailedCount > 0 {
		text = "Some sessions could not now: ask again."
	}
	fmt.Fprintf(w, "%s (%.2f s)\n", text, rep.DurationSecs)
}

// rekeyRows is a row for each reason, the most frequent first.
func rekeyRows(result string, notes []admin.SessionNote, total int) (rows [][]string) {
	const named = 5
	by := map[string][]string{}
	for _, n := range notes {
		by[n.Why] = append(by[n.Why], n.Session)
	}
	for _, why := range slices.SortedFunc(maps.Keys(by), func(a, b string) int {
		return cmp.Or(cmp.Compare(len(by[b]), len(by[a])), cmp.Compare(a, b))
	}) {
		list := by[why]
		which := strings.Join(list[:min(named, len(list))], " ")
		if len(list) > named {
			which += " …"
		}
		rows = append(rows, []string{result, strconv.Itoa(len(list)), why, which})
	}
	if total > len(notes) {
		rows = append(rows, []string{result, strconv.Itoa(total - len(notes)), "not listed", "-"})
	}
	return rows
}
