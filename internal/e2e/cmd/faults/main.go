package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/e2e/faults"
)

func main() {
	var o faults.Options
	flag.StringVar(&o.Bin, "bin", "bin/fault", "folder")
	flag.StringVar(&o.Layer, "layer", "software", "layer")
	flag.BoolVar(&o.Trace, "trace", false, "")
	v := flag.Bool("v", false, "")
	only := flag.String("only", "", "")
	jobs := flag.Int("j", 3, "")
	all := flag.String("all", "", "")
	flag.Parse()
	o.Bin, _ = filepath.Abs(o.Bin)
	var cases []faults.Case
	for _, a := range flag.Args() {
		c, err := faults.ParseCase(a)
		if err != nil {
			panic(err)
		}
		cases = append(cases, c)
	}
	if *all != "" {
		for _, op := range strings.Split(*all, ",") {
			t := o
			t.Trace = true
			r := faults.Run(context.Background(), t, faults.Case{Op: op})
			fmt.Println(op, r.OK(), r.Wrong)
			for _, c := range faults.Cases(op, r.Steps, false) {
				if strings.Contains(c.String(), *only) {
					cases = append(cases, c)
				}
			}
		}
	}
	fmt.Println(len(cases), "cases")
	ch := make(chan faults.Case)
	var wg sync.WaitGroup
	var mu sync.Mutex
	for range *jobs {
		wg.Go(func() {
			for c := range ch {
				r := faults.Run(context.Background(), o, c)
				mu.Lock()
				word := "ok "
				if !r.OK() {
					word = "BAD"
				}
				fmt.Println(word, c, "| reached", r.Reached, "exit", r.Exit, "seen", r.Seen.Lost, r.Seen.Interrupted, "cnt", r.Counters, r.Took.Round(time.Millisecond))
				for _, w := range r.Wrong {
					fmt.Println("  WRONG", w)
				}
				for _, s := range r.Steps {
					fmt.Println("  ", s)
				}
				if *v {
					fmt.Fprintln(os.Stderr, r.Log)
				}
				mu.Unlock()
			}
		})
	}
	for _, c := range cases {
		ch <- c
	}
	close(ch)
	wg.Wait()
}
